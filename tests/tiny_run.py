"""Training runs small enough for any test: phantoms at 32 px, one layer a tower."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bvl.checkpoint import Checkpoints
from bvl.config import CheckpointConfig, Config, LogConfig
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import Encoder, RunFolder
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig
from bvl.train.setup import plan_state
from bvl.train.step import make_train_step

PHANTOMS = Phantoms(num_patients=30, image_size=32)


def tiny_config(workdir: Path | str | None = None, **changes: Any) -> Config:
    """Six steps of eight contrastive pairs; `changes` replace top-level keys."""
    config = Config(
        steps=6,
        batch_size=8,
        model=DualEncoderConfig(
            image=ViTConfig("XXS/16", pool="mean", width=32, depth=1, num_heads=2),
            text=TextConfig(width=32, depth=1, num_heads=2),
            embed_dim=16,
        ),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=(Source(phantoms=PHANTOMS, split=None, cache=True),),
            preprocess=Preprocess(image_size=32),
            tokenizer=TokenizerConfig(vocab_size=300, context_length=16),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        log=LogConfig(every=2, tensorboard=False),
        workdir=None if workdir is None else str(workdir),
    )
    return dataclasses.replace(config, **changes)


def compiled_programs(tmp_path_factory) -> Path:
    """The folder of compiled programs that all tests share, also those of several worker processes."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


_PROGRAMS: dict[Any, Any] = {}


def once(kind: str, parts: tuple[Any, ...], make: Any) -> Any:
    """What `make()` gave first for equal parts; it holds on to them, so that ids among them stay theirs."""
    key = kind, repr(parts)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = make(), parts
    return _PROGRAMS[key][0]


@pytest.fixture
def traced_once(monkeypatch):
    """Runs of equal programs share their jitted functions, as if one process went on; new processes are tested in
    test_end_to_end.py. Fixtures of wider scope do not."""

    def plan(config, program):
        return once("plan", (config.optim, config.steps, program), lambda: plan_state(config, program))

    def step(program, optimizer, shardings):
        make = lambda: make_train_step(program, optimizer, shardings)  # noqa: E731
        return once("step", (program, id(optimizer)), make)

    def encoder(*parts):
        return once("encoder", parts, lambda: Encoder(*parts))

    monkeypatch.setattr("bvl.train.loop.plan_state", plan)
    monkeypatch.setattr("bvl.train.loop.make_train_step", step)
    monkeypatch.setattr("bvl.train.loop.Encoder", encoder)


@pytest.fixture(scope="module")
def fast_compilation(tmp_path_factory):
    """Compile with few optimisations, and equal programs once; tiny models gain nothing from more."""
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(compiled_programs(tmp_path_factory)),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    old = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


def saved_items(run: Path, step: int | None = None) -> dict[str, Any]:
    """Every array of a checkpoint (the newest by default), by item."""
    checkpoints = Checkpoints(RunFolder(run).checkpoints, read_only=True)
    try:
        step = checkpoints.latest() if step is None else step
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        trees = {
            name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)
            for name in ("params", "ema", "rest", "sums", "guard")
            if (tree := checkpoints.describe(step, name)) is not None
        }
        return jax.tree.map(np.asarray, checkpoints.restore(step, trees))
    finally:
        checkpoints.close()


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the keys under time/."""
    lines = RunFolder(run).metrics.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def assert_same_trees(actual: Any, expected: Any) -> None:
    """Equal bit for bit, and of the same structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
