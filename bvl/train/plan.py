"""What a config needs of memory, work and transfers, before the first step, and which knob to turn where it is too much."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh

from bvl.config import Config, with_value
from bvl.errors import UserError
from bvl.mesh import AXES, batch_sharding, check_batch_size, make_mesh, mesh_shape, replicated
from bvl.train.abstract import AbstractData, abstract_batch, abstract_data, abstract_program
from bvl.train.collectives import Program as Hlo
from bvl.train.estimate import Model, bytes_of, bytes_on_device, remat_towers, transfers, working_bytes
from bvl.train.setup import plan_state
from bvl.train.step import check_accumulation, make_train_step

Shape = tuple[int, int, int]

# Columns of contrastive logits that are few and still keep matrix units busy.
SMALL_CHUNK = 1024
_UNITS = {"M": 2, "G": 3, "T": 4}


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
            "working memory": working_bytes(model, shape, self.rows),
        }
        return {what: size for what, size in memory.items() if size}

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def knobs(estimate: Estimate) -> dict[str, Estimate]:
    """What can be turned to need less memory, each on its own -> the same formula with it turned."""
    model, config, (over_data, fsdp, tensor) = estimate.model, estimate.config, estimate.shape
    found = {}

    def add(*overrides: str, shape: Shape = estimate.shape, traced: bool = False) -> None:
        changed = config
        for override in overrides:
            key, _, value = override.partition("=")
            changed = with_value(changed, key, value)
        if any("scan=" in override for override in overrides):
            turned = Model.of(changed, model.data)
        else:
            turned = model.computed_as(changed) if traced else model.with_config(changed)
        if traced and changed.precision == config.precision:
            turned.__dict__["plain"] = model.plain
        found[" ".join(overrides)] = Estimate(turned, shape)

    remat = {name: tower.remat for name, tower in remat_towers(config.model).items()}
    for policy, weaker in (("dots", ("none",)), ("full", ("none", "dots"))):
        if changes := [f"model.{name}.remat={policy}" for name, now in remat.items() if now in weaker]:
            add(*changes, traced=True)
    unrolled = [name for name in remat if not getattr(getattr(config.model, name), "scan", True)]
    if fsdp > 1 and unrolled:
        scanned = [f"model.{name}.scan=true" for name in unrolled]
        add(*scanned, traced=True)
    if config.precision == "float32":
        add("precision=bfloat16", traced=True)
    if over_data > 1:
        shape = (1, over_data * fsdp, tensor)
        add(f"mesh.shape={','.join(map(str, shape))}", shape=shape)
    for name, task in config.tasks.items():
        if getattr(task, "chunk_size", 0) is None and estimate.rows * config.optim.accumulate > SMALL_CHUNK:
            add(f"tasks.{name}.chunk_size={SMALL_CHUNK}")
    if estimate.rows % 2 == 0:
        add(f"optim.accumulate={2 * config.optim.accumulate}")
        add(f"batch_size={config.batch_size // 2}")
    return found


def together(estimate: Estimate, turned: dict[str, Estimate], memory: int) -> dict[str, Estimate]:
    """Several knobs at once, where none alone makes a step fit: layers computed again, all split over all devices, and
    as few microbatches as fit; empty where that is not enough."""
    if any(e.total <= memory for e in (estimate, *turned.values())):
        return {}
    names = [name for name in turned if name.endswith("remat=full") or name.startswith("mesh.shape=")]
    shape = next((turned[name].shape for name in names if name.startswith("mesh.")), estimate.shape)
    model = next((turned[name].model for name in names if name.endswith("remat=full")), estimate.model)
    accumulate = estimate.config.optim.accumulate
    while not (rows := estimate.rows * estimate.config.optim.accumulate) % accumulate and accumulate <= rows:
        config = with_value(model.config, "optim.accumulate", str(accumulate))
        found = Estimate(model.with_config(config), shape)
        if found.total <= memory:
            more = accumulate > estimate.config.optim.accumulate
            return {" ".join([*names, f"optim.accumulate={accumulate}"] if more else names): found}
        accumulate *= 2
    return {}


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
    compiled: also what the compiler of JAX's backend says, for which it must have so many devices.
    Raises ConfigError for a mesh or a batch that does not fit the devices.
    """
    num_devices = jax.device_count() if num_devices is None else num_devices
    shape = mesh_shape(config.mesh, num_devices)
    mesh = AbstractMesh(shape, AXES)
    check_batch_size(config.batch_size, mesh)
    check_accumulation(config.optim.accumulate, config.tasks, config.batch_size, mesh)
    data = abstract_data(config)
    model = Model.of(config, data)
    estimate = Estimate(model, shape)
    turned = knobs(estimate)
    if memory is not None:
        turned |= together(estimate, turned, memory)
    sizes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    lines = [
        f"{num_devices} device(s): {sizes}; batch of {config.batch_size}, {estimate.rows} rows of it at a time on a device",
        *(f"assumed: {line}" for line in data.assumed),
        "",
        "memory of a device, GB (an estimate)",
        *(f"  {what:28}{size / 1e9:10.3f}" for what, size in estimate.memory.items()),
        f"  {'total':28}{estimate.total / 1e9:10.3f}{_verdict(estimate, memory)}",
        *(compiled_lines(compiled_step(config, data, num_devices)) if compiled else ()),
        "",
        f"work of a step: {model.flops:.4g} FLOPs, {model.flops / num_devices:.4g} on a device"
        + (f", {model.flops / num_devices / peak_flops:.4g} s at its best" if peak_flops else ""),
        "",
        "transfers of a device in a step, GB",
        *(f"  {kind:28}{size / 1e9:10.3f}" for kind, size in transfers(model, shape).items()),
        "",
        f"what to turn, and GB of a device then{'' if memory is None else f' (of {memory / 1e9:.3f})'}",
        *(
            f"  {name:{max(map(len, turned))}}{changed.total / 1e9:10.3f}{_verdict(changed, memory)}"
            for name, changed in turned.items()
        ),
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def explain_out_of_memory(config: Config) -> Iterator[None]:
    """Turn the devices' out-of-memory error into OutOfMemory with the plan of the config on this process's devices."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        try:
            table = plan_table(config, memory=_device_memory())
        except Exception:
            # What went wrong first is what the user must see.
            raise error from None
        raise OutOfMemory(f"the devices are out of memory: {text.splitlines()[0]}\n\n{table}") from error


def _device_memory() -> int | None:
    """Bytes that a device of this process has for arrays, where its backend says it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _verdict(estimate: Estimate, memory: int | None) -> str:
    if memory is None:
        return ""
    fits = "fits in" if estimate.total <= memory else "is too much for"
    return f"   {fits} {memory / 1e9:.3f} ({estimate.total / memory:.0%})"


def compiled_step(config: Config, data: AbstractData, num_devices: int) -> jax.stages.Compiled:
    """The training step compiled for the first `num_devices` devices of this process; no array is made."""
    mesh = make_mesh(config.mesh, devices=jax.devices()[:num_devices])
    program = abstract_program(config, data, mesh)
    plan = plan_state(config, program)

    def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    frozen = placed(dict.fromkeys(program.frozen, plan.target.params["model"]), replicated(mesh))
    batch = placed(abstract_batch(config, data, config.batch_size), batch_sharding(mesh))
    return (
        make_train_step(program, plan.optimizer, plan.shardings).lower(plan.target, frozen, batch).compile()
    )


def compiled_lines(compiled: jax.stages.Compiled) -> list[str]:
    """What the program needs on a device by the compiler of JAX's backend, and the transfers that it writes."""
    memory, moved = compiled.memory_analysis(), Hlo(compiled.as_text()).bytes_by_kind()
    lines = {"arguments": (memory.argument_size_in_bytes, "")}
    backend = jax.default_backend()
    note = "   (an accelerator's compiler fuses more)" if backend == "cpu" else ""
    lines["temporaries"] = memory.temp_size_in_bytes, note
    lines |= {kind: (size, "   moved") for kind, size in moved.items()}
    return [
        f"  {backend.upper()} compiler, {what:14}{size / 1e9:10.3f}{note}"
        for what, (size, note) in lines.items()
    ]
