"""Where a run starts."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl.data.sources import Source
from bvl.errors import DataError
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


def test_records_without_the_text_are_named_before_a_tokenizer_is_made(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,report\n0.png,a spot\n1.png,a ring\n")
    config = tiny_config(tmp_path / "run")
    data = dataclasses.replace(config.data, train=(Source(root=str(tmp_path), split=None),))
    with pytest.raises(DataError, match="text='caption'.*2 without text.*Fields .* image, report"):
        train(dataclasses.replace(config, data=data))
