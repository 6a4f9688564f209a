"""Keys under time/: compilations are heard while listened to, rates follow from the steps counted."""

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from bvl.train import timing
from bvl.train.timing import CompileClock, CountedStep, Timing, memory


def test_a_counted_step_compiles_once_and_gives_its_memory_back():
    compiled, traced = [], []

    def product(x, y):
        traced.append(x)
        return x @ y, y

    listen = lambda event, *_, **__: compiled.append(event) if event == timing.COMPILATION[1] else None  # noqa: E731
    step = CountedStep(jax.jit(product, donate_argnums=0))
    x, y = jnp.ones((8, 8)), jnp.eye(8)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert step.flops is None
        out, _ = step(x, y)
        step(out, y)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert step.flops == 2 * 8**3 and len(compiled) == 1 and len(traced) == 1
    assert x.is_deleted() and out.is_deleted()


def test_the_clock_hears_compilations_until_closed():
    clock = CompileClock()
    try:
        jax.jit(lambda x: x + 1).lower(1.0).compile()
        heard = clock.seconds
    finally:
        clock.close()
    jax.jit(lambda x: x + 2).lower(1.0).compile()
    assert heard > 0 and clock.seconds == heard


@pytest.fixture
def time_stands_at(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_row(time_stands_at):
    watch = Timing(batch_size=8, peak_flops=1000.0)
    try:
        with watch.part("data"):
            time_stands_at(102.0)
        with watch.part("other"):
            time_stands_at(110.0)
        watch.step(), watch.step()
        time_stands_at(112.0)
        jax.monitoring.record_event_duration_secs(timing.COMPILATION[0], 1.5)
        row = watch.row(flops=200)
        expected = {
            "time/step_s": 2.0, "time/examples_per_s": 4.0, "time/data_wait_share": 0.5,
            "time/compile_s": 1.5, "time/flops_per_s": 100.0, "time/peak_share": 0.1,
        }  # fmt: skip
        assert expected.items() <= row.items() and row["time/host_memory_gb"] > 0.01
        watch.reset()
        watch.step()
        time_stands_at(113.0)
        row = watch.row(flops=None)
        assert row["time/compile_s"] == 0.0 and row["time/step_s"] == 1.0
        assert not {"time/flops_per_s", "time/peak_share"} & row.keys()
    finally:
        watch.close()


def test_no_share_of_an_unknown_peak(time_stands_at):
    watch = Timing(batch_size=8, peak_flops=None)
    watch.step()
    time_stands_at(101.0)
    row = watch.row(flops=200)
    watch.close()
    assert row["time/flops_per_s"] == 200.0 and "time/peak_share" not in row


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_of_the_fullest_device():
    devices = [Device({"peak_bytes_in_use": n}) for n in (2e9, 3e9)]
    assert memory(lambda: devices)["time/device_memory_gb"] == 3.0
    # A CPU says nothing, another backend perhaps something else.
    for silent in (Device(None), Device({"bytes_in_use": 1})):
        assert memory(lambda silent=silent: [silent]).keys() == {"time/host_memory_gb"}
