"""Where a run starts."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl.checkpoint import check_same_shapes
from bvl.data.sources import Source
from bvl.errors import CheckpointError, DataError
from bvl.mesh import MeshConfig, make_mesh
from bvl.train.loop import train
from bvl.train.optim import OptimConfig
from bvl.train.setup import _with_own_rows

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


def test_controls_that_the_other_run_had_not_get_fresh_rows(caplog):
    """At the end of the vocabulary, and of the positions since the prefix is longer; all other rows are the old ones."""
    rng = np.random.default_rng(0)

    def params_of(ids, positions, width=4):
        table = lambda rows: jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)  # noqa: E731
        decoder = {
            "token_embed": table(ids),
            "head": table(ids),
            "positions": table(positions),
            "norm": table(3),
        }
        return {"text": {"token_embed": table(ids), "positions": table(5)}, "decoder": decoder}

    mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    old, fresh = params_of(20, 7), params_of(26, 11)
    with caplog.at_level(logging.INFO):
        grown = _with_own_rows(old, fresh, mesh)
    check_same_shapes(fresh, grown, "the test")
    for part, name, rows in (
        ("text", "token_embed", 20), ("decoder", "token_embed", 20), ("decoder", "head", 20), ("decoder", "positions", 7),
    ):  # fmt: skip
        np.testing.assert_array_equal(grown[part][name][:rows], old[part][name])
        np.testing.assert_array_equal(grown[part][name][rows:], fresh[part][name][rows:])
        assert f"{part}/{name}: {len(fresh[part][name]) - rows} fresh rows behind {rows}" in caplog.text
    assert grown["text"]["positions"] is old["text"]["positions"]
    assert grown["decoder"]["norm"] is old["decoder"]["norm"]
    # Fewer slots in the prefix leave the first positions; no other table shrinks, and none of another width changes.
    fewer = _with_own_rows(fresh, old, mesh)
    np.testing.assert_array_equal(fewer["decoder"]["positions"], fresh["decoder"]["positions"][:7])
    for given, own in ((fresh, old), (old, params_of(26, 11, width=8))):
        with pytest.raises(CheckpointError, match="decoder/head"):
            check_same_shapes(own, _with_own_rows(given, own, mesh), "the test")


def test_records_without_the_text_are_named_before_a_tokenizer_is_made(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,report\n0.png,a spot\n1.png,a ring\n")
    config = tiny_config(tmp_path / "run")
    data = dataclasses.replace(config.data, train=(Source(root=str(tmp_path), split=None),))
    with pytest.raises(DataError, match="text='caption'.*2 without text.*Fields .* image, report"):
        train(dataclasses.replace(config, data=data))
