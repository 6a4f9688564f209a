"""What a training step is made of: parameters, views, encodings and the tasks' losses. It knows no task by name."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh

from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError
from bvl.models.dropout import RowKeys, fold, keys_of_parts
from bvl.models.vlm import DualEncoder, normalize_image
from bvl.tasks.base import Context, Features, ModelInfo, Task, View
from bvl.train.guard import Guard
from bvl.train.lora import Adapter
from bvl.train.optim import Optimizer
from bvl.train.parameters import LORA, named_leaves, parameter_name

# Name of a parameter below "model/" -> new value, for the running statistics of batch norms.
Statistics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """`params` = {"model": ..., "heads": {task: {name: ...}}}, with low-rank factors also "lora"; `extra` by task.

    `ema`: like params, the averaged parameters that are to be evaluated, or None. `guard`: what bad steps are told by.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    extra: dict[str, Any]
    guard: Any = None


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything the step is made of, apart from arrays.

    frozen: name -> (model, preprocess) of encoders that are only read.
    group_norms: also give norms of gradients, updates and parameters by group.
    adapter: the low-rank factors that are trained, where there are any.
    guard: undoes bad steps, where that is asked for.
    """

    model: DualEncoder
    preprocess: Preprocess
    tasks: dict[str, Task]
    info: ModelInfo
    mesh: Mesh
    seed: int
    ema_decay: float
    frozen: dict[str, tuple[DualEncoder, Preprocess]]
    group_norms: bool = False
    adapter: Adapter | None = None
    guard: Guard | None = None

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axis names."""
        height, width = self.preprocess.height_width
        tokens = jnp.zeros((1, self.model.context_length), jnp.int32)
        image = jnp.zeros((1, height, width, 3), jnp.float32)
        model = self.model.init(jax.random.fold_in(key, 0), image, tokens, tokens == 0)["params"]
        heads: dict[str, Any] = {}
        for i, (name, task) in enumerate(self.tasks.items()):
            for j, (head_name, head) in enumerate(task.heads(self.info).items()):
                head_key = jax.random.fold_in(jax.random.fold_in(key, 1 + i), j)
                heads.setdefault(name, {})[head_name] = head.init(head_key)
        params = {"model": model, "heads": heads}
        if self.adapter is not None:
            params["lora"] = self.adapter.init(params, jax.random.fold_in(key, _number("lora")))
        return params

    def merge(self, params: Any) -> Any:
        """The parameters that the model runs with: {"model": ..., "heads": ...}."""
        return params if self.adapter is None else self.adapter.merge(params)

    def init_state(self, key: jax.Array, optimizer: Optimizer) -> TrainState:
        """A fresh state, boxed; give it to `bvl.mesh.init_sharded`."""
        params = self.init_params(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            # A copy: donated buffers may not be shared.
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay or optimizer.averages else None,
            extra={name: task.init_extra(self.info) for name, task in self.tasks.items()},
            guard=None if self.guard is None else self.guard.init(),
        )

    def views(self, tasks: Collection[str] | None = None) -> dict[str, dict[str, View]]:
        """encoder -> input -> the view with the union of the needs of these tasks, by default of all."""
        union: dict[str, dict[str, View]] = {}
        for name in self.tasks if tasks is None else tasks:
            for view in self.tasks[name].views():
                if view.encoder != "model" and view.encoder not in self.frozen:
                    raise ConfigError(
                        f"a task reads the frozen encoder {view.encoder!r}: name it in the config's frozen"
                    )
                views = union.setdefault(view.encoder, {})
                known = views.get(view.input, view)
                if known.kind != view.kind:
                    raise ConfigError(f"tasks read {view.input!r} both as {known.kind} and as {view.kind}")
                views[view.input] = dataclasses.replace(view, need=known.need | view.need)
        return union

    def row_keys(self, batch: dict[str, jax.Array], rng: jax.Array) -> RowKeys:
        """One random key for each row of the batch, from the step's key."""
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["row"])

    def prepare(self, batch: dict[str, jax.Array], rng: jax.Array) -> dict[str, jax.Array]:
        """The batch with row numbers and what the tasks add to it."""
        batch = {"row": jnp.arange(len(next(iter(batch.values())))), **batch}
        keys, added = self.row_keys(batch, rng), {}
        for name, task in self.tasks.items():
            for key, value in task.prepare(batch, fold(keys, _number(f"prepare/{name}")), self.info).items():
                if key in batch or key in added:
                    raise ConfigError(f"task {name!r} makes the batch key {key!r}, which is there already")
                added[key] = value
        return batch | added

    def encode(
        self,
        model: DualEncoder,
        preprocess: Preprocess,
        params: Any,
        batch: dict[str, jax.Array],
        views: dict[str, View],
        *,
        keys: dict[str, RowKeys | None] | None = None,
    ) -> tuple[dict[str, Features], Statistics]:
        """(input -> features of the batch, batch norms' new statistics); texts are flattened to [B * K, T], as are
        images of which a row has several.

        keys: kind -> keys of the rows where its tower is trained.
        """
        out, statistics = {}, []
        for name, view in views.items():
            # Two inputs of one row have masks of their own.
            row_keys = fold((keys or {}).get(view.kind), _number(name))
            if view.kind == "image":
                pixels = batch[name]
                if pixels.ndim == 5:
                    row_keys = keys_of_parts(row_keys, pixels.shape[1])
                    pixels = rearrange(pixels, "b n h w c -> (b n) h w c")
                elif row_keys is not None:
                    # There may be fewer than rows.
                    row_keys = row_keys[: len(pixels)]
                inputs = (normalize_image(pixels, preprocess.mean, preprocess.std, model.dtype),)
            else:
                inputs = tuple(rearrange(batch[key], "b k t -> (b k) t") for key in (name, f"{name}_mask"))
                row_keys = keys_of_parts(row_keys, batch[name].shape[1])
            out[name], sown = model.apply(
                {"params": params},
                *inputs,
                view.need,
                row_keys,
                method=f"encode_{view.kind}",
                mutable=["statistics"],
            )
            leaves = jax.tree_util.tree_leaves_with_path(sown.get("statistics", {}))
            statistics.append({parameter_name(path): value for path, value in leaves})
        together = {key: [s[key] for s in statistics if key in s] for found in statistics for key in found}
        return out, {key: sum(values) / len(values) for key, values in together.items()}

    def features(
        self,
        params: Any,
        frozen_params: dict[str, Any],
        batch: dict[str, jax.Array],
        rng: jax.Array,
        *,
        trains: Callable[[str], bool] = lambda name: True,
        tasks: Collection[str] | None = None,
    ) -> tuple[dict[str, Features], dict[str, dict[str, Features]], Statistics]:
        """What the losses of these tasks (by default of all) read of a prepared batch: (input -> features, frozen encoder
        -> input -> features without gradient, statistics). Options as in `loss`."""
        trained = self._keys_of_trained(params, self.row_keys(batch, rng), trains)
        views = self.views(tasks)
        features, statistics = self.encode(
            self.model,
            self.preprocess,
            self.merge(params)["model"],
            batch,
            views.get("model", {}),
            keys=trained,
        )
        frozen = {
            name: jax.lax.stop_gradient(
                self.encode(*self.frozen[name], frozen_params[name], batch, wanted)[0]
            )
            for name, wanted in views.items()
            if name != "model"
        }
        return features, frozen, statistics

    def losses(
        self,
        params: Any,
        extra: dict[str, Any],
        features: dict[str, Features],
        frozen: dict[str, dict[str, Features]],
        batch: dict[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
        *,
        trains: Callable[[str], bool] = lambda name: True,
        tasks: Collection[str] | None = None,
        shares: dict[str, jax.Array] | None = None,
        part: int | jax.Array = 0,
    ) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        """(weighted sum of the losses of these tasks, by default of all, (metrics, new extra)) of the batch's `features`.

        The parameters count where a loss reads them directly: heads, scale and bias, a decoder.
        shares: task -> factor of its loss, and `part` the microbatch's number, where the batch is one of several.
        """
        keys = self.row_keys(batch, rng)
        decoder_keys = self._keys_of_trained(params, keys, trains).get("decoder")
        params = self.merge(params)
        apply = functools.partial(self.model.apply, {"params": params["model"]})
        scale, bias = apply(method="logit_scale_and_bias")
        total, metrics, new_extra = jnp.zeros(()), {}, {}
        for name in self.tasks if tasks is None else tasks:
            task = self.tasks[name]
            heads = {
                head_name: functools.partial(head.module.apply, {"params": params["heads"][name][head_name]})
                for head_name, head in task.heads(self.info).items()
            }
            number = _number(f"task/{name}")
            output = task.loss(
                Context(
                    features=features,
                    frozen=frozen,
                    heads=heads,
                    model=apply,
                    scale=scale,
                    bias=bias,
                    token_embed=params["model"].get("text", {}).get("token_embed"),
                    batch=batch,
                    extra=extra[name],
                    rng=jax.random.fold_in(jax.random.fold_in(rng, number), part),
                    keys=fold(keys, number),
                    decoder_keys=fold(decoder_keys, number),
                    step=step,
                    mesh=self.mesh,
                    info=self.info,
                )
            )
            total += task.weight * output.loss * (1.0 if shares is None else shares[name])
            new_extra[name] = extra[name] if output.extra is None else output.extra
            metrics[name] = {
                key: jnp.stack(jnp.broadcast_arrays(*map(jnp.float32, pair)))
                for key, pair in output.metrics.items()
            }
        return total, (metrics, new_extra)

    def loss(
        self,
        params: Any,
        extra: dict[str, Any],
        frozen_params: dict[str, Any],
        batch: dict[str, jax.Array],
        rng: jax.Array,
        step: jax.Array,
        *,
        trains: Callable[[str], bool] = lambda name: True,
    ) -> tuple[jax.Array, tuple[Any, dict[str, Any], Statistics]]:
        """(weighted sum of the tasks' losses, (metrics, new extra, statistics)) of a prepared batch.

        trains: which parameters are; a tower that has none is encoded as in evaluation.
        """
        features, frozen, statistics = self.features(params, frozen_params, batch, rng, trains=trains)
        total, (metrics, new_extra) = self.losses(
            params, extra, features, frozen, batch, rng, step, trains=trains
        )
        return total, (metrics, new_extra, statistics)

    def _keys_of_trained(
        self, params: Any, keys: RowKeys, trains: Callable[[str], bool]
    ) -> dict[str, RowKeys]:
        """kind -> keys of the rows, for the towers (and the decoder) that have parameters which are trained."""
        learned = [name.removeprefix(LORA) for name in named_leaves(params) if trains(name)]
        trained = {
            kind: keys
            for kind in ("image", "text", "decoder")
            if any(name.startswith(f"model/{kind}/") for name in learned)
        }
        if "text" not in params["model"] and "decoder" in trained:
            # The decoder's first half is the text tower.
            trained["text"] = keys
        return trained


def _number(name: str) -> int:
    """A number to fold into a key, the same in every process."""
    return zlib.crc32(name.encode())
