"""Low-rank adaptation (LoRA: Hu et al. 2021, arXiv:2106.09685) as a transform of parameters.

A kernel W0 [in, out] stays as it is and W = W0 + (alpha / rank) A B is used in its place, with A [in, rank] and
B [rank, out], B = 0 at first (section 4.1, equation 3, for rows times kernels). The factors are parameters of their
own, params["lora"], of which the model knows nothing: the step merges them into the kernels before it runs the model.
A checkpoint's `params` are merged, so that whatever reads a run sees ordinary parameters; the kernels W0 and the factors
stand beside the optimiser's state, and a resume goes on from these.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bvl.errors import ConfigError
from bvl.train.parameters import LORA, named_leaves

if TYPE_CHECKING:
    from bvl.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """targets: patterns of the kernels that get factors, by default attention's queries and values (Hu et al.,
    section 7.1); a stack of scanned layers has factors for each layer.
    train: patterns of the other parameters that are trained as well, by default heads, projections and the logits'
    scale and bias. What else a run has fresh, such as a decoder that no model of init_from has, must be named here.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"(attention|cross)/(query|value)/kernel$",)
    train: tuple[str, ...] = (r"^heads/|_projection/|^model/(log_scale|logit_bias)$",)

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora rank={self.rank}: must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"lora alpha={self.alpha}: must be above 0")
        if not self.targets:
            raise ConfigError(
                "lora targets is empty: name kernels, for example attention/(query|value)/kernel$"
            )
        for pattern in (*self.targets, *self.train):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained: all factors are."""
        return name.startswith(LORA) or any(re.search(pattern, name) for pattern in self.train)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of a run. freeze: patterns of kernels that get none."""

    config: LoraConfig
    freeze: tuple[str, ...] = ()

    @classmethod
    def of(cls, optim: OptimConfig) -> Adapter | None:
        """What optim.lora asks for, None where it is not set."""
        return None if optim.lora is None else cls(optim.lora, optim.freeze)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    def kernels(self, params: Any) -> list[str]:
        """Names of the kernels that get factors.

        Raises ConfigError for a pattern that matches no kernel of two axes, and for a rank above a kernel's.
        """
        shapes = {name: x.shape for name, x in named_leaves(params).items() if not name.startswith(LORA)}
        matrices = [
            name
            for name, shape in shapes.items()
            if name.endswith("kernel") and len(shape) - ("/blocks/" in name) == 2
        ]
        for option, patterns, names in (
            ("targets", self.config.targets, matrices),
            ("train", self.config.train, shapes),
        ):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in names):
                    what = "kernel of two axes" if option == "targets" else "parameter"
                    raise ConfigError(
                        f"optim.lora.{option}: {pattern!r} matches no {what}; names look like "
                        f"{', '.join(list(names)[:3])}"
                    )
        found = [
            name
            for name in matrices
            if any(re.search(p, name) for p in self.config.targets)
            and not any(re.search(p, name) for p in self.freeze)
        ]
        if not found:
            raise ConfigError(
                "optim.freeze matches every kernel of optim.lora.targets: no factor is left to train"
            )
        for name in found:
            if self.config.rank > min(shapes[name][-2:]):
                raise ConfigError(
                    f"optim.lora.rank={self.config.rank} is larger than {name}, a matrix of "
                    f"{shapes[name][-2]} x {shapes[name][-1]}"
                )
        return found

    def init(self, params: Any, key: jax.Array) -> dict[str, Any]:
        """Fresh factors {"model": {... "kernel": {"a", "b"}}} for boxed parameters: A normal with deviation
        1 / sqrt(in), so that the entries of x A are as large as those of x, and B zero."""
        leaves = named_leaves(params, boxed=True)
        factors = {}
        for name in self.kernels(params):
            box = leaves[name]
            *lead, rows, columns = box.value.shape
            *lead_names, row_name, column_name = box.names
            noise = jax.random.normal(
                jax.random.fold_in(key, zlib.crc32(name.encode())), (*lead, rows, self.config.rank)
            )
            a, b = noise / rows**0.5, jnp.zeros((*lead, self.config.rank, columns))
            factors[f"{name}/a"] = nn.Partitioned(a, (*lead_names, row_name, None))
            factors[f"{name}/b"] = nn.Partitioned(b, (*lead_names, None, column_name))
        return unflatten_dict(factors, sep="/")

    def merge(self, params: Any) -> Any:
        """{"model", "heads"} with the factors merged into their kernels; differentiable."""
        kernels = _merged(self.base(params), params["lora"], self.scale)
        return _replaced(params, kernels)

    def merged(self, params: Any) -> Any:
        """`merge` of arrays, compiled; the merged kernels are placed as the others are."""
        base = self.base(params)
        shardings = jax.tree.map(lambda x: x.sharding, base)
        merge = jax.jit(_merged, static_argnames="scale", out_shardings=shardings)
        return _replaced(params, merge(base, params["lora"], scale=self.scale))

    def base(self, params: Any) -> dict[str, Any]:
        """The kernels W0 that have factors, as a tree."""
        names = {name.rpartition("/")[0] for name in flatten_dict(params["lora"], sep="/")}
        leaves = named_leaves({k: v for k, v in params.items() if k != "lora"})
        return unflatten_dict({name: leaves[name] for name in names}, sep="/")

    def saved(self, params: Any, ema: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(parameters, their average or None, what more a resume needs), as a checkpoint holds them; for shapes
        (ShapeDtypeStruct) the shapes of these."""
        more = {"base": self.base(params), "factors": params["lora"]}
        if ema is not None:
            more["ema_factors"] = ema["lora"]
        shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
        plain = _without_factors if shapes else self.merged
        return plain(params), None if ema is None else plain(ema), more

    def restored(self, params: Any, ema: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        """(parameters, their average or None) of what `saved` gave."""

        params = {**_replaced(params, more["base"]), "lora": more["factors"]}
        if ema is not None:
            # A copy: donated buffers may not be shared.
            base = jax.tree.map(jnp.copy, more["base"])
            ema = {**_replaced(ema, base), "lora": more["ema_factors"]}
        return params, ema


def _merged(base: Any, factors: Any, scale: float) -> Any:
    """W0 + scale * A B of every kernel; the leading axis of scanned stacks is one of layers."""
    kernels, flat = flatten_dict(base, sep="/"), flatten_dict(factors, sep="/")
    out = {}
    for name, kernel in kernels.items():
        product = jnp.matmul(flat[f"{name}/a"], flat[f"{name}/b"], precision=jax.lax.Precision.HIGHEST)
        out[name] = kernel + scale * product
    return unflatten_dict(out, sep="/")


def _without_factors(params: Any) -> Any:
    return {name: tree for name, tree in params.items() if name != "lora"}


def _replaced(params: Any, kernels: Any) -> Any:
    """The parameters without factors, with these kernels."""

    def put(tree: Any, part: Any) -> Any:
        if not isinstance(tree, dict):
            return part
        return {name: put(x, part[name]) if name in part else x for name, x in tree.items()}

    return put(_without_factors(params), kernels)
