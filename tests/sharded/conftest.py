"""Tests on 8 fake CPU devices. They need a process of their own: `python -m pytest tests/sharded`."""

import jax
import pytest

NUM_DEVICES = 8

try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
except RuntimeError:
    pass  # the backend is already running: the fixture below says so


@pytest.fixture(autouse=True)
def eight_devices():
    if jax.device_count() != NUM_DEVICES:
        pytest.skip(
            f"JAX already runs with {jax.device_count()} device(s) in this process; "
            "run these alone: python -m pytest tests/sharded"
        )
