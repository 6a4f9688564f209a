"""Optimisers by their optax name, schedules, decay masks, learning rates and freezing by parameter name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import optax

from bvl.errors import ConfigError
from bvl.mesh import unbox


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """name: any optax optimiser; options: its further arguments, for example {"b2": 0.95}.

    The learning rate rises linearly over `warmup_steps`, then follows `schedule` down to `final_fraction` of `lr`.
    weight_decay is the optimiser's own (decoupled for AdamW) or, where it has none, is added to the clipped gradient; it touches parameters of two axes or more that match no `no_decay` pattern.
    Patterns are regular expressions searched in names such as "model/image/stack/block_0/mlp/up/kernel".
    lr_multipliers: pattern -> factor of the learning rate (first match counts); freeze: patterns without update.
    ema_decay: 0 keeps no moving average; else the average starts fast, with decay min(ema_decay, (1 + t) / (10 + t)).
    """

    name: str = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = (r"positions$", r"cls$", r"probe$", r"token_embed$")
    lr_multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    clip_norm: float | None = 1.0
    ema_decay: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not callable(getattr(optax, self.name, None)):
            near = difflib.get_close_matches(self.name, [n for n in dir(optax) if not n.startswith("_")], n=1)
            raise ConfigError(
                f"optax has no optimiser {self.name!r}" + (f"; nearest is {near[0]!r}" if near else "")
            )
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}: must lie in [0, 1)")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps}: must be 0 or more")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay}: must be 0 or more")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction={self.final_fraction}: must lie in [0, 1]")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"clip_norm={self.clip_norm}: must be above 0, or null for no clipping")
        for pattern in (*self.no_decay, *self.freeze, *self.lr_multipliers):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def parameter_name(path: tuple[Any, ...]) -> str:
    """ "model/image/..." for a tree path; the boxes that carry axis names add nothing."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def make_schedule(config: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step."""
    if config.warmup_steps >= steps and config.schedule != "constant":
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} leaves no step of {steps} for the {config.schedule} schedule; "
            f"set for example optim.warmup_steps={steps // 10}"
        )
    decay_steps = max(steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, decay_steps, alpha=config.final_fraction),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final_fraction, decay_steps),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    # (t + 1) / warmup: the first step already moves, and step `warmup_steps` has the full rate.
    warmup = optax.linear_schedule(
        config.lr / config.warmup_steps, config.lr, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """The gradient transformation for parameters of these names and shapes (arrays or ShapeDtypeStruct).

    Raises ConfigError for a pattern that matches no parameter and for options the optimiser does not take.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [parameter_name(path) for path, _ in leaves]
    for option in ("freeze", "lr_multipliers"):
        for pattern in getattr(config, option):
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(
                    f"optim.{option}: {pattern!r} matches no parameter; names look like {', '.join(names[:3])}"
                )

    def by_name(function: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, x: function(parameter_name(path), x), tree
        )

    def decays(name: str, x: Any) -> bool:
        # A stack of layers has one leading axis more than each of its layers.
        axes = len(x.shape) - ("/blocks/" in name)
        return axes >= 2 and not any(re.search(p, name) for p in config.no_decay)

    def multiplier(name: str) -> float:
        return next((m for p, m in config.lr_multipliers.items() if re.search(p, name)), 1.0)

    factory = getattr(optax, config.name)
    takes = inspect.signature(factory).parameters
    options = dict(config.options)
    transforms = []
    if config.clip_norm is not None:
        transforms.append(optax.clip_by_global_norm(config.clip_norm))
    # Given also where it is 0: optax's own default is another, and without a mask.
    if {"weight_decay", "mask"} <= takes.keys():
        options |= {"weight_decay": config.weight_decay, "mask": by_name(decays)}
    elif "weight_decay_mask" in takes:
        key = "weight_decay_rate" if "weight_decay_rate" in takes else "weight_decay"
        options |= {"weight_decay_mask": by_name(decays), key: config.weight_decay or None}
    elif config.weight_decay:
        # Added to the gradient, which for SGD is the same as decoupled decay.
        transforms.append(optax.add_decayed_weights(config.weight_decay, mask=by_name(decays)))
    unknown = [name for name in options if name not in takes]
    if unknown:
        raise ConfigError(
            f"optax.{config.name} does not take {', '.join(unknown)}; it takes {', '.join(takes)}"
        )
    try:
        transforms.append(factory(learning_rate=make_schedule(config, steps), **options))
    except TypeError as error:
        raise ConfigError(f"optax.{config.name}: {error}") from error
    if config.lr_multipliers:
        transforms.append(_scale_by_name(by_name(lambda name, _: multiplier(name))))
    transform = optax.chain(*transforms)
    if not config.freeze:
        return transform
    labels = by_name(
        lambda name, _: "frozen" if any(re.search(p, name) for p in config.freeze) else "trained"
    )
    return optax.multi_transform({"trained": transform, "frozen": optax.set_to_zero()}, labels)


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The optimiser's state for boxed parameters; an array in it is boxed where it has its parameter's axes.

    Of a frozen parameter the box holds nothing, and Adafactor's row and column means lack an axis.
    """

    def keep(box: Any) -> Any:
        fits = isinstance(box, nn.Partitioned) and getattr(box.value, "ndim", None) == len(box.names)
        return box if fits else unbox(box)

    state = optimizer.init(params)
    return jax.tree.map(keep, state, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _scale_by_name(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors(updates))

    return optax.stateless(scale)
