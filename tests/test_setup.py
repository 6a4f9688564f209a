"""Where a run starts."""

import jax
import numpy as np
import pytest
from tiny_run import fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl.train.loop import train
from bvl.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_an_optimizer_with_parameters_of_its_own_starts_from_those_of_the_other_run(tmp_path):
    """A schedule-free average starts at the other run's parameters, not at fresh ones."""
    assert train(tiny_config(tmp_path / "first", steps=1, optim=OptimConfig(warmup_steps=0))) == 0
    optim = OptimConfig(name="contrib.schedule_free_adamw", lr=1e-6, schedule="constant", warmup_steps=0)
    assert (
        train(tiny_config(tmp_path / "second", steps=1, optim=optim, init_from=str(tmp_path / "first"))) == 0
    )
    first, second = saved_items(tmp_path / "first"), saved_items(tmp_path / "second")
    # One step at this rate moves nothing by more.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, second["params"]["model"], first["params"]["model"])
    jax.tree.map(close, second["ema"]["model"], first["params"]["model"])
