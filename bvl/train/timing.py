"""What a row says about time, work and memory: its keys under time/, the only ones in which equal runs may differ."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring

from bvl import hosts
from bvl.train.flops import count_flops

# Lowering and XLA's own work; a program that the compilation cache gives counts with the time of reading it.
COMPILATION = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class CountedStep:
    """A jitted function that knows, after its first call, its floating-point operations over all devices."""

    def __init__(self, step: Any):
        self._step = step
        self.flops: int | None = None

    def __call__(self, *args: Any) -> Any:
        if self.flops is None:
            # The call that follows finds this trace in JAX's cache.
            traced = self._step.trace(*args)
            self.flops = count_flops(traced.jaxpr)
            if hosts.count() > 1:
                # Devices wait for each other for seconds only (gloo on CPU: 30), and one host may compile for longer.
                self._step = traced.lower().compile()
                hosts.barrier("the step is compiled")
        return self._step(*args)


class CompileClock:
    """Seconds of compilation anywhere in the process, from its making to `close`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        if event in COMPILATION:
            self.seconds += duration

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


class Timing:
    """Wall time since the last row, the parts of it that were waiting or no training, work done, and memory.

    peak_flops: FLOP/s that all devices together can do at best, or None.
    """

    def __init__(self, *, batch_size: int, peak_flops: float | None):
        self._batch_size, self._peak_flops = batch_size, peak_flops
        self._clock = CompileClock()
        self._compiled = 0.0
        self.reset()

    def reset(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._steps = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time spent on "data" (waiting for it) or on "other" (what is no training step)."""
        start = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def step(self) -> None:
        self._steps += 1

    def row(self, flops: int | None) -> dict[str, float]:
        """The `time/` metrics of the steps since `reset`; evaluation and checkpoint time is left out of the rates.

        flops: floating-point operations of one step over all devices.
        """
        seconds = max(time.perf_counter() - self._start - self._parts.get("other", 0.0), 1e-9)
        compiled, self._compiled = self._compiled, self._clock.seconds
        values = {
            "time/step_s": seconds / self._steps,
            "time/examples_per_s": self._steps * self._batch_size / seconds,
            "time/data_wait_share": self._parts.get("data", 0.0) / seconds,
            "time/compile_s": self._compiled - compiled,
        }
        if flops:
            values["time/flops_per_s"] = flops * self._steps / seconds
            if self._peak_flops is not None:
                values["time/peak_share"] = values["time/flops_per_s"] / self._peak_flops
        return values | memory()

    def close(self) -> None:
        self._clock.close()


def memory(devices: Callable[[], list[jax.Device]] = jax.local_devices) -> dict[str, float]:
    """Largest memory so far in GB: of this process, and of its fullest device where the backend says it."""
    unit = 1 if sys.platform == "darwin" else 1024
    values = {"time/host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    stats = [device.memory_stats() or {} for device in devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        values["time/device_memory_gb"] = max(peaks) / 1e9
    return values
