"""What a config needs of memory, work and transfers, before the first step, and which knob to turn where it is too much."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re

import jax
from jax.sharding import AbstractMesh

from bvl.config import Config, with_value
from bvl.errors import ConfigError, UserError
from bvl.mesh import AXES, check_batch_size, mesh_shape
from bvl.train.abstract import abstract_batch, abstract_data
from bvl.train.estimate import TOWERS, Model, bytes_of, bytes_on_device
from bvl.train.step import check_accumulation

Shape = tuple[int, int, int]

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


class OutOfMemory(UserError):
    """The devices have no room for a run; the message has the plan."""


def parse_memory(text: str) -> int:
    """Bytes of a size such as 80GB or 16GiB; raises UserError for another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(
            f"--memory {text}: give the memory of one device with its unit, for example 80GB or 16GiB"
        )
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one device by what takes them, for a model on a mesh of this shape."""

    model: Model
    shape: Shape

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def rows(self) -> int:
        """Rows of a device in one microbatch."""
        return self.config.batch_size // (self.shape[0] * self.shape[1] * self.config.optim.accumulate)

    @functools.cached_property
    def memory(self) -> dict[str, float]:
        """What -> bytes."""
        model, shape = self.model, self.shape
        on_device = functools.partial(bytes_on_device, shape=shape)
        gradients = on_device(model.trained)
        batch = bytes_of(abstract_batch(self.config, model.data, self.config.batch_size))
        memory = {
            "parameters": on_device(model.state.params),
            "optimiser": on_device(model.state.opt_state),
            "moving average": on_device(model.state.ema) if model.state.ema is not None else 0,
            "extra state of tasks": bytes_of(model.state.extra),
            "frozen models": sum(map(bytes_of, model.frozen_params.values())),
            # Those of a microbatch and their sum.
            "gradients": gradients * (2 if self.config.optim.accumulate > 1 else 1),
            "batch": batch / (shape[0] * shape[1]),
            "activations": model.kept.on_device(self.rows, shape),
            "working memory": self._working(),
        }
        return {what: size for what, size in memory.items() if size}

    def _working(self) -> float:
        return 0.0

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Knob:
    """A change of the config and what one device would then need."""

    name: str
    estimate: Estimate


def knobs(estimate: Estimate) -> list[Knob]:
    """What can be turned to need less memory, each on its own, evaluated by the same formula."""
    config, data, (over_data, fsdp, tensor) = estimate.config, estimate.model.data, estimate.shape
    found = []

    def add(*overrides: str, shape: Shape = estimate.shape, traced: bool = True) -> None:
        changed = config
        for override in overrides:
            key, _, value = override.partition("=")
            changed = with_value(changed, key, value)
        model = Model.of(changed, data) if traced else estimate.model.with_config(changed)
        found.append(Knob(" ".join(overrides), Estimate(model, shape)))

    remat = {name: t.remat for name in TOWERS if hasattr(t := getattr(config.model, name), "remat")}
    for policy in ("dots", "full"):
        if changes := [
            f"model.{n}.remat={policy}" for n, now in remat.items() if now not in (policy, "full")
        ]:
            add(*changes)
    if config.precision == "float32":
        add("precision=bfloat16")
    if over_data > 1:
        shape = (1, over_data * fsdp, tensor)
        add(f"mesh.shape={','.join(map(str, shape))}", shape=shape, traced=False)
    if estimate.rows % 2 == 0:
        with contextlib.suppress(ConfigError):
            more = 2 * config.optim.accumulate
            check_accumulation(more, config.tasks, config.batch_size, AbstractMesh(estimate.shape, AXES))
            add(f"optim.accumulate={more}", traced=False)
        add(f"batch_size={config.batch_size // 2}", traced=False)
    return found


def plan_table(
    config: Config,
    *,
    num_devices: int | None = None,
    memory: int | None = None,
    peak_flops: float | None = None,
    compiled: bool = False,
) -> str:
    """The plan of a config as text; see `bvl plan --help`.

    num_devices: None = those of this process's JAX. memory: bytes of one device. peak_flops: FLOP/s of one device.
    compiled: also what the CPU compiler says, for which JAX must have so many devices.
    Raises ConfigError for a mesh or a batch that does not fit the devices.
    """
    num_devices = jax.device_count() if num_devices is None else num_devices
    shape = mesh_shape(config.mesh, num_devices)
    mesh = AbstractMesh(shape, AXES)
    check_batch_size(config.batch_size, mesh)
    check_accumulation(config.optim.accumulate, config.tasks, config.batch_size, mesh)
    data = abstract_data(config)
    estimate = Estimate(Model.of(config, data), shape)
    lines = [
        f"{num_devices} devices as {', '.join(f'{axis} {size}' for axis, size in zip(AXES, shape, strict=True))}; "
        f"batch_size {config.batch_size}, {estimate.rows} rows a device at once",
        *(f"assumed: {line}" for line in data.assumed),
        "",
        *_memory_lines(estimate, memory),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(estimate: Estimate, memory: int | None) -> list[str]:
    lines = ["memory of one device (GB)"]
    lines += [f"  {what:24}{_gb(size)}" for what, size in estimate.memory.items()]
    lines.append(f"  {'total, an estimate':24}{_gb(estimate.total)}{_verdict(estimate, memory)}")
    return lines


def _verdict(estimate: Estimate, memory: int | None) -> str:
    if memory is None:
        return ""
    fits = "fits in" if estimate.total <= memory else "does not fit in"
    return f"   {fits} {memory / 1e9:.2f} ({estimate.total / memory:.0%})"


def _gb(size: float) -> str:
    return f"{size / 1e9:12.3f}"
