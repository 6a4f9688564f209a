"""The configs that name a system: full-size ones resolve and have the towers they say, tiny ones train and evaluate."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import fast_compilation, metric_rows  # noqa: F401

from bvl.config import load_config, with_value
from bvl.mesh import unbox
from bvl.models.vlm import DualEncoder
from bvl.runs import RunFolder
from bvl.train.loop import train
from bvl.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIGS = Path(__file__).parent.parent / "configs"
# Parameters in millions: image tower, text tower (with the config's vocabulary), both with projections.
SIZES = {
    "clip": (87.5, 63.2, 151.3),
    "siglip": (92.9, 109.7, 203.2),
    "align": (23.5, 333.6, 359.2),
    "convirt": (23.5, 107.7, 134.4),
    "biomedclip": (85.8, 108.9, 195.9),
    "pubmedclip": (87.5, 63.2, 151.3),
    "flair": (23.5, 107.7, 132.7),
    "unimed_clip": (85.8, 108.9, 195.5),
    "bioclip": (85.8, 63.2, 149.6),
    "medclip": (23.5, 107.7, 132.7),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_sized_towers(name):
    config = load_config(f"{CONFIGS / name}.py", ["data.root=records"])
    assert all(source.root.startswith("records") for source in config.data.sources())
    assert config.eval.suites and not any(suite.reads_phantoms() for suite in config.eval.suites.values())
    for task in config.tasks.values():
        task.check(config.model)
    size, tokens = config.data.preprocess.height_width, config.data.tokenizer
    model = DualEncoder(config.model, size, tokens.vocab_size, tokens.context_length, end_id=3)
    image, text = jnp.zeros((1, *size, 3)), jnp.zeros((1, tokens.context_length), jnp.int32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image, text, text == 0))["params"]
    counts = [_millions(tree) for tree in (shapes["image"], shapes["text"], shapes)]
    assert counts == pytest.approx(SIZES[name], rel=0.01), counts
    # Patterns match, warm-up leaves room, the optimiser takes its options.
    make_optimizer(config.optim, config.steps, {"model": shapes})


def _millions(tree) -> float:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6


def shrunk(name: str, workdir: Path, *overrides: str):
    """The tiny config with fewer patients and a few steps."""
    spec = f"{CONFIGS / name}.py:tiny"
    config = load_config(spec)
    fewer = [f"data.train.{i}.phantoms.num_patients=60" for i in range(len(config.data.train))]
    fewer += [f"eval.suites.{suite}.source.phantoms.num_patients=60" for suite in config.eval.suites]
    short = ["steps=3", "batch_size=8", "optim.warmup_steps=1", "eval.batch_size=16", "checkpoint.every=0"]
    quick = ["log.every=1", "log.norms=false", "log.tensorboard=false", f"workdir={workdir}"]
    return load_config(spec, [*fewer, *short, *quick, *overrides])


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory, fast_compilation):  # noqa: F811
    config = shrunk("clip", tmp_path_factory.mktemp("clip"))
    assert train(config) == 0
    return config


def check_run(config, steps: int) -> None:
    run = RunFolder(config.workdir)
    rows = metric_rows(config.workdir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss/total"]) for row in rows)
    results = json.loads(run.eval.read_text()) if config.eval.suites else {}
    for name in config.eval.suites:
        assert any(key.startswith(f"{name}/") for key in results), name


def test_tiny_clip(clip_run):
    check_run(clip_run, 3)


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("clip", "pubmedclip")])
def test_tiny(name, tmp_path):
    """Of these, flair alone also evaluates, which clip and pubmedclip do anyway; the others' suites are opened."""
    config = shrunk(name, tmp_path)
    if name != "flair":
        for suite in config.eval.suites.values():
            suite.check()
        config = with_value(config, "eval.suites", "{}")
    assert train(config) == 0
    check_run(config, 3)


def test_tiny_pubmedclip_goes_on_from_clip_and_stops_early(clip_run, tmp_path):
    """No recall gains more than 1: the run ends after the first evaluation and two more."""
    config = shrunk(
        "pubmedclip",
        tmp_path,
        f"init_from={clip_run.workdir}",
        "steps=20",
        "eval.every=1",
        "eval.stop_patience=2",
        "eval.stop_min_delta=1",
        "checkpoint.every=10",
    )
    assert train(config) == 0
    check_run(config, 3)
