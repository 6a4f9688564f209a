"""Optimisers by their optax name, schedules, decay masks, learning rates and freezing by parameter name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.train.lora import LoraConfig
from bvl.train.parameters import (
    LORA,
    STATISTICS,
    is_matrix,
    layer_factors,
    map_by_name,
    merge,
    named_leaves,
    split,
)

# Their optax factories take neither a mask nor multipliers, so the wrapper is put around the optimiser named here.
SCHEDULE_FREE = {"contrib.schedule_free_adamw": "adamw", "contrib.schedule_free_sgd": "sgd"}
SCHEDULE_FREE_OPTIONS = ("b1", "weight_lr_power", "state_dtype")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """name: any optax optimiser, with a dot for those of optax.contrib ("contrib.muon"); options: its further
    arguments, for example {"b2": 0.95}.

    The learning rate rises linearly over `warmup_steps`, then follows `schedule`: "cosine" and "linear" go down to
    `final_fraction` of `lr`, "constant" stays, "rsqrt" is lr * sqrt(timescale / (timescale + steps since the
    warm-up)). Over the last `cooldown_steps` it goes in a straight line from there to `final_fraction` of `lr`.
    weight_decay is the optimiser's own (decoupled and times the learning rate for AdamW, Lion, Adafactor; within the
    trust ratio for LAMB and LARS) or, where it has none with a mask, is added to the clipped gradient; it touches
    parameters of two axes or more that match no `no_decay` pattern.
    Patterns are regular expressions searched in names such as "model/image/stack/block_0/mlp/up/kernel".
    lr_multipliers: pattern -> factor of the learning rate (first match counts). layer_decay: each layer of a tower
    or decoder learns at this fraction of the rate of the layer above it. freeze: patterns without gradient, update or
    state.
    lora: train low-rank factors of some kernels in place of the parameters (bvl/train/lora.py); patterns that match
    a kernel count for its factors.
    accumulate: microbatches a step. The gradients are those of the whole batch for every task, except that batch norms
    see a microbatch: tasks that compare rows with each other, as contrastive ones do, have each microbatch encoded twice
    and keep only what they compare (`_accumulated` in bvl/train/step.py).
    ema_decay: 0 keeps no moving average; else the average starts fast, with decay min(ema_decay, (1 + t) / (10 + t)).
    "contrib.schedule_free_adamw" and "contrib.schedule_free_sgd" keep an average of their own, which is evaluated
    and stored as the moving average is (Defazio et al. 2024, arXiv:2405.15682); batch norms keep the statistics of
    the parameters that are trained, not of that average.
    """

    name: str = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    warmup_steps: int = 100
    timescale: int = 10_000
    cooldown_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = (
        r"positions$",
        r"cls$",
        r"registers$",
        r"probe$",
        r"token_embed$",
        r"types$",
        r"queries$",
        r"cells$",
        r"kinds$",
        r"null$",
    )
    lr_multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
    layer_decay: float | None = None
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    clip_norm: float | None = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not callable(_find(self.name)):
            known = [n for n in dir(optax) if not n.startswith("_")]
            known += [f"contrib.{n}" for n in dir(optax.contrib) if not n.startswith("_")]
            near = difflib.get_close_matches(self.name, known, n=1)
            raise ConfigError(
                f"optax has no optimiser {self.name!r}" + (f"; nearest is {near[0]!r}" if near else "")
            )
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}: must lie in [0, 1)")
        for option in ("warmup_steps", "cooldown_steps", "weight_decay"):
            if getattr(self, option) < 0:
                raise ConfigError(f"{option}={getattr(self, option)}: must be 0 or more")
        for option in ("timescale", "accumulate"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option}={getattr(self, option)}: must be 1 or more")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction={self.final_fraction}: must lie in [0, 1]")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay={self.layer_decay}: must lie in (0, 1], or null for none")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"clip_norm={self.clip_norm}: must be above 0, or null for no clipping")
        if self.name in SCHEDULE_FREE:
            if self.schedule != "constant" or self.cooldown_steps:
                raise ConfigError(
                    f"optim.name={self.name!r} replaces the schedule's decay: set optim.schedule='constant' and "
                    "optim.cooldown_steps=0 (warm-up stays)"
                )
            if self.ema_decay:
                raise ConfigError(f"optim.name={self.name!r} keeps its own average: set optim.ema_decay=0")
        for pattern in (*self.no_decay, *self.freeze, *self.lr_multipliers):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def _find(name: str) -> Any:
    """The attribute of optax with this (dotted) name, or None."""
    return functools.reduce(lambda found, part: getattr(found, part, None), name.split("."), optax)


def make_schedule(config: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step; raises ConfigError if warm-up and cool-down leave no step between them."""
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    if warmup >= steps and config.schedule != "constant":
        raise ConfigError(
            f"warmup_steps={warmup} leaves no step of {steps} for the {config.schedule} schedule; "
            f"set for example optim.warmup_steps={steps // 10}"
        )
    if cooldown and warmup + cooldown > steps:
        raise ConfigError(
            f"warmup_steps={warmup} and cooldown_steps={cooldown} are more than the {steps} steps of the run; "
            f"set for example optim.cooldown_steps={max(steps - warmup, 0) // 2}"
        )
    decay_steps = max(steps - warmup, 1)
    final = config.lr * config.final_fraction
    schedule = {
        "cosine": optax.cosine_decay_schedule(config.lr, decay_steps, alpha=config.final_fraction),
        "linear": optax.linear_schedule(config.lr, final, decay_steps),
        "constant": optax.constant_schedule(config.lr),
        "rsqrt": lambda t: config.lr * jnp.sqrt(config.timescale / (config.timescale + t)),
    }[config.schedule]
    if warmup:
        # (t + 1) / warmup: the first step already moves, and step `warmup_steps` has the full rate.
        rise = optax.linear_schedule(config.lr / warmup, config.lr, max(warmup - 1, 1))
        schedule = optax.join_schedules([rise, schedule], [warmup])
    if cooldown:
        fall = optax.linear_schedule(float(schedule(steps - cooldown)), final, cooldown)
        schedule = optax.join_schedules([schedule, fall], [steps - cooldown])
    return schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update of the trained parameters, and which those are.

    transform: sees trained parameters alone; in its trees the others are None.
    """

    config: OptimConfig
    transform: optax.GradientTransformationExtraArgs

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name gets a gradient."""
        plain, lora = name.removeprefix(LORA), self.config.lora
        if STATISTICS.search(name) or any(re.search(p, plain) for p in self.config.freeze):
            return False
        return lora is None or lora.trains(name)

    def split(self, params: Any) -> tuple[Any, Any]:
        """(trained, frozen) parameters, boxed or not."""
        return split(params, self.trains)

    def init(self, params: Any) -> Any:
        """The state for parameters; of boxed ones an array is boxed where it has its parameter's axes.

        Adafactor's row and column means lack an axis.
        """

        def keep(box: Any) -> Any:
            fits = isinstance(box, nn.Partitioned) and getattr(box.value, "ndim", None) == len(box.names)
            return box if fits else unbox(box)

        state = self.transform.init(self.split(params)[0])
        return jax.tree.map(keep, state, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    @property
    def averages(self) -> bool:
        """Whether the optimiser's own average of the parameters is what should be evaluated."""
        return self.config.name in SCHEDULE_FREE

    def eval_params(self, state: Any, params: Any) -> Any:
        """The parameters to evaluate where the optimiser `averages`: its average, and the frozen ones as given."""
        is_state = lambda s: isinstance(s, optax.contrib.ScheduleFreeState)  # noqa: E731
        found = next(s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s))
        trained, frozen = self.split(params)
        return merge(optax.contrib.schedule_free_eval_params(found, trained), frozen)


def make_optimizer(config: OptimConfig, steps: int, params: Any) -> Optimizer:
    """The optimiser for parameters of these names and shapes (arrays or ShapeDtypeStruct).

    Raises ConfigError for a pattern that matches no parameter, for options the optimiser does not take, and for an
    optimiser that needs more than the gradient, the parameters and the loss.
    """
    shapes = {name: x.shape for name, x in named_leaves(params).items()}
    for option in ("freeze", "lr_multipliers"):
        for pattern in getattr(config, option):
            if not any(re.search(pattern, name) for name in shapes):
                raise ConfigError(
                    f"optim.{option}: {pattern!r} matches no parameter; names look like {', '.join(list(shapes)[:3])}"
                )
    decays = functools.partial(map_by_name, lambda name, x: _decays(config, name, x))
    schedule = make_schedule(config, steps)
    transforms = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    scale = _multipliers(config, shapes)
    options = dict(config.options)
    if config.name in SCHEDULE_FREE:
        own = {key: options.pop(key) for key in SCHEDULE_FREE_OPTIONS if key in options}
        name = SCHEDULE_FREE[config.name]
        # The average takes the place of the inner optimiser's momentum.
        inner = _base(name, config, schedule, options | ({"b1": 0.0} if name == "adamw" else {}), decays)
        transforms.append(optax.contrib.schedule_free(optax.chain(*inner, *scale), schedule, **own))
    else:
        transforms += [*_base(config.name, config, schedule, options, decays), *scale]
    optimizer = Optimizer(config, optax.with_extra_args_support(optax.chain(*transforms)))
    if not any(map(optimizer.trains, shapes)):
        raise ConfigError("optim.freeze matches every parameter: nothing is left to train")
    _check_fits(optimizer)
    return optimizer


def _decays(config: OptimConfig, name: str, x: Any) -> bool:
    return is_matrix(name, x) and not any(re.search(p, name) for p in config.no_decay)


def _base(
    name: str,
    config: OptimConfig,
    schedule: Callable[[Any], Any],
    options: dict[str, Any],
    decays: Callable[[Any], Any],
) -> list[optax.GradientTransformation]:
    """The named optimiser with the schedule and masked weight decay, as parts of a chain."""
    factory = _find(name)
    takes = inspect.signature(factory).parameters
    transforms = []
    # Given also where it is 0: optax's own default is another, and without a mask.
    if {"weight_decay", "mask"} <= takes.keys():
        options |= {"weight_decay": config.weight_decay, "mask": decays}
    elif {"weight_decay_rate", "weight_decay_mask"} <= takes.keys():
        # Adafactor takes this rate as it stands, whatever the learning rate.
        rate = (lambda t: config.weight_decay * schedule(t)) if config.weight_decay else None
        options |= {"weight_decay_rate": rate, "weight_decay_mask": decays}
    elif "weight_decay_mask" in takes:
        options |= {"weight_decay": config.weight_decay, "weight_decay_mask": decays}
    elif config.weight_decay:
        # Added to the gradient, which for SGD is the same as decoupled decay.
        transforms.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    if "muon_weight_dimension_numbers" in takes:
        options.setdefault("muon_weight_dimension_numbers", functools.partial(_muon_axes, config))
    unknown = [option for option in options if option not in takes]
    if unknown:
        raise ConfigError(f"optax.{name} does not take {', '.join(unknown)}; it takes {', '.join(takes)}")
    try:
        transform = factory(learning_rate=schedule, **options)
    except TypeError as error:
        raise ConfigError(f"optax.{name}: {error}") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise ConfigError(f"optax.{name} is no optimiser")
    return [*transforms, transform]


def _muon_axes(config: OptimConfig, params: Any) -> Any:
    """Muon's specification: decayed matrices, of a stack each layer's, are orthogonalised; the rest is Adam's."""

    def axes(name: str, x: Any) -> Any:
        stacked = "/blocks/" in name
        if len(x.shape) - stacked != 2 or not _decays(config, name, x):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=stacked, output_axis=1 + stacked)

    return map_by_name(axes, params)


def _multipliers(
    config: OptimConfig, shapes: dict[str, tuple[int, ...]]
) -> list[optax.GradientTransformation]:
    """Factors of the updates by parameter, as a part of a chain; none where the config asks for none."""
    if not config.lr_multipliers and config.layer_decay is None:
        return []
    factors = {} if config.layer_decay is None else layer_factors(shapes, config.layer_decay)

    def scaled(name: str, update: jax.Array) -> jax.Array:
        plain = name.removeprefix(LORA)
        named = next((m for p, m in config.lr_multipliers.items() if re.search(p, plain)), 1.0)
        return update * named * factors.get(name, 1.0)

    return [optax.stateless(lambda updates, _=None: map_by_name(scaled, updates))]


def _check_fits(optimizer: Optimizer) -> None:
    """Raise ConfigError if an update cannot be made as the training step makes it; tried on shapes alone."""

    def update(params: Any) -> Any:
        state = optimizer.transform.init(params)
        return optimizer.transform.update(params, state, params, value=jnp.zeros(()))

    tiny = {
        "kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    try:
        jax.eval_shape(update, {"model": tiny})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"optax.{optimizer.config.name} does not fit the training step: {error}") from error
