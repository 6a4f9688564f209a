"""Low-rank adaptation: a transform of parameters that leaves nothing behind but ordinary ones."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_and_resume import assert_same_runs
from tiny_run import assert_same_trees, fast_compilation, saved_items, tiny_config  # noqa: F401

import bvl
from bvl.config import CheckpointConfig
from bvl.data.text import Tokenizer
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, make_mesh, unbox
from bvl.runs import build_model
from bvl.tasks.base import ModelInfo
from bvl.train.loop import train
from bvl.train.lora import Adapter, LoraConfig
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.parameters import group_of, layer_factors, named_leaves
from bvl.train.program import Program

pytestmark = pytest.mark.usefixtures("fast_compilation")

LORA = LoraConfig(rank=2, alpha=6.0)
# `scan` gives the image tower a leading axis of layers.
CONFIG = tiny_config(optim=OptimConfig(lr=1e-2, warmup_steps=0, lora=LORA, ema_decay=0.9))
CONFIG = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        CONFIG.model, image=dataclasses.replace(CONFIG.model.image, depth=2, scan=True)
    ),
)
TARGETS = [
    f"model/{tower}/stack/{block}/attention/{part}/kernel"
    for tower, block in (("image", "blocks"), ("text", "block_0"))
    for part in ("query", "value")
]


def program_of(optim=CONFIG.optim):
    tokenizer = Tokenizer.without_words(CONFIG.data.tokenizer.context_length)
    return Program(
        model=build_model(CONFIG, tokenizer),
        preprocess=Preprocess(image_size=32),
        tasks=CONFIG.tasks,
        info=ModelInfo(32, 32, 16, ()),
        mesh=make_mesh(MeshConfig(), devices=jax.local_devices()[:1]),
        seed=0,
        ema_decay=0.0,
        frozen={},
        adapter=Adapter.of(optim),
    )


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)


@pytest.fixture(scope="module")
def program():
    return program_of()


@pytest.fixture(scope="module")
def boxed(program):
    return jax.eval_shape(program.init_params, jax.random.key(0))


@pytest.fixture(scope="module")
def params(boxed):
    """All of them random, B too."""
    return filled(unbox(boxed))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return {
        "row": jnp.arange(4),
        "image": jnp.asarray(rng.integers(0, 255, (4, 32, 32, 3)), jnp.uint8),
        "image_valid": jnp.ones(4, bool),
        "text": jnp.asarray(rng.integers(0, 4, (4, 1, 16)), jnp.int32),
        "text_mask": jnp.ones((4, 1, 16), bool),
        "text_valid": jnp.ones((4, 1), bool),
        "text_id": jnp.arange(4, dtype=jnp.uint32)[:, None],
        "valid": jnp.ones(4, bool),
    }


def test_factors_of_kernels_and_of_stacks_of_layers(boxed):
    """Names, shapes and axes; B is zero at first, so that nothing changes."""
    names = named_leaves(boxed["lora"], boxed=True)
    assert sorted(names) == sorted(f"{name}/{factor}" for name in TARGETS for factor in "ab")
    assert names[f"{TARGETS[0]}/a"].value.shape == (2, 32, 2)
    assert names[f"{TARGETS[0]}/a"].names == ("layers", "embed", None)
    assert names[f"{TARGETS[3]}/b"].value.shape == (2, 32)
    assert names[f"{TARGETS[3]}/b"].names == (None, "heads")
    adapter = Adapter(LORA)
    kernel = nn.Partitioned(jnp.ones((64, 16)), ("embed", "heads"))
    tree = {"model": {"attention": {"query": {"kernel": kernel}}, "log_scale": jnp.zeros(())}, "heads": {}}
    factors = unbox(adapter.init(tree, jax.random.key(0)))["model"]["attention"]["query"]["kernel"]
    assert not factors["b"].any() and factors["a"].std() == pytest.approx(64**-0.5, rel=0.2)
    merged = adapter.merge({**unbox(tree), "lora": unbox(adapter.init(tree, jax.random.key(0)))})
    assert_same_trees(merged, unbox(tree))


def test_the_merged_kernels(program, params):
    """W0 + (alpha / rank) A B, of a stack in each layer; all else as it was."""
    merged = program.merge(params)
    assert merged.keys() == {"model", "heads"}
    old, new, factors = (named_leaves(tree) for tree in (params, merged, params["lora"]))
    for name in new:
        if name in TARGETS:
            a, b = (np.asarray(factors[f"{name}/{f}"], np.float64) for f in "ab")
            expected = np.asarray(old[name], np.float64) + 3.0 * (a @ b)
            np.testing.assert_allclose(new[name], expected, atol=1e-5)
        else:
            assert new[name] is old[name]


def test_the_gradient_is_that_of_the_merged_matrices(program, params, batch):
    """With G the gradient of W: dA = s G B^T, dB = s A^T G, for the training loss of the whole program."""

    def loss(params, adapter):
        run = dataclasses.replace(program, adapter=adapter)
        return run.loss(params, {"contrastive": {}}, {}, batch, jax.random.key(0), jnp.zeros((), int))[0]

    value, mine = jax.jit(jax.value_and_grad(lambda p: loss(p, program.adapter)))(params)
    plain = program.merge(params)
    merged_value, theirs = jax.jit(jax.value_and_grad(lambda p: loss(p, None)))(plain)
    np.testing.assert_allclose(value, merged_value, rtol=1e-6)
    theirs, grads, factors = named_leaves(theirs), named_leaves(mine["lora"]), named_leaves(params["lora"])
    for name in TARGETS:
        whole, a, b = theirs[name], factors[f"{name}/a"], factors[f"{name}/b"]
        assert np.abs(whole).max() > 1e-6
        for factor, expected in (
            ("a", 3.0 * whole @ jnp.swapaxes(b, -1, -2)),
            ("b", 3.0 * jnp.swapaxes(a, -1, -2) @ whole),
        ):
            error = np.abs(grads[f"{name}/{factor}"] - expected).max() / np.abs(expected).max()
            assert error < 2e-5, (name, factor)


def test_the_optimiser_knows_the_factors_alone(program, boxed):
    """And heads, projections and the logits' scale, or what `train` names; the rest has no state."""
    shapes = unbox(boxed)
    optimizer = make_optimizer(CONFIG.optim, 10, shapes)
    trained = {n for n in named_leaves(shapes) if optimizer.trains(n)}
    extra = {n for n in trained if not n.startswith("lora/")}
    assert extra == {"model/image_projection/kernel", "model/text_projection/kernel", "model/log_scale"}
    assert len(trained) == len(extra) + 2 * len(TARGETS)
    state = jax.eval_shape(optimizer.init, shapes)
    assert {n for n in named_leaves(state) if n} == trained
    # A frozen tower has no factors; a rate by name and layer-wise decay hold for a kernel's factors.
    optim = OptimConfig(
        warmup_steps=0, lora=LORA, freeze=("^model/text/",), lr_multipliers={"^model/image/": 0.5}
    )
    shapes = unbox(jax.eval_shape(program_of(optim).init_params, jax.random.key(0)))
    assert all(n.startswith("model/image/") for n in named_leaves(shapes["lora"]))
    sizes = {n: x.shape for n, x in named_leaves(shapes).items()}
    factors = layer_factors(sizes, 0.5)
    np.testing.assert_array_equal(factors[f"lora/{TARGETS[0]}/a"].ravel(), factors[TARGETS[0]].ravel())
    assert group_of(f"lora/{TARGETS[0]}/a") == "image"


def test_a_tower_whose_factors_are_trained_is_encoded_as_in_training(program, params, batch, monkeypatch):
    seen = {}

    def encode(self, model, preprocess, params, batch, views, *, keys=None):
        seen.update(keys)
        raise StopIteration

    monkeypatch.setattr(Program, "encode", encode)
    optimizer = make_optimizer(CONFIG.optim, 10, params)
    with pytest.raises(StopIteration):
        program.loss(params, {}, {}, batch, jax.random.key(0), jnp.zeros((), int), trains=optimizer.trains)
    assert seen.keys() == {"image", "text"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(targets=("attention/qeury",)), "lora.targets: 'attention/qeury' matches no kernel of two axes"),
        (dict(targets=("query/bias$",)), "matches no kernel of two axes"),
        (dict(train=("nothing",)), "lora.train: 'nothing' matches no parameter"),
        (dict(rank=33), "rank=33 is larger than model/.*, a matrix of 32 x 32"),
    ],
)
def test_what_cannot_be_adapted(options, message, boxed):
    adapter = Adapter(dataclasses.replace(LORA, **options))
    with pytest.raises(ConfigError, match=message):
        adapter.kernels(boxed)


def test_bad_options(boxed):
    for options in (dict(rank=0), dict(alpha=0.0), dict(targets=()), dict(targets=("(",))):
        with pytest.raises(ConfigError):
            LoraConfig(**options)
    with pytest.raises(ConfigError, match="no factor is left"):
        Adapter(LORA, freeze=("attention",)).kernels(boxed)


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "whole"
    config = dataclasses.replace(CONFIG, steps=4, checkpoint=CheckpointConfig(every=2, keep=3))
    assert train(dataclasses.replace(config, workdir=str(folder))) == 0
    return config, folder


def test_a_checkpoint_holds_ordinary_parameters(adapted_run):
    """Merged, of the names and shapes of any run; beside them what a resume needs."""
    _, folder = adapted_run
    items = saved_items(folder)
    assert items["params"].keys() == items["ema"].keys() == {"model", "heads"}
    lora = items["rest"]["lora"]
    assert lora.keys() == {"base", "factors", "ema_factors"}
    whole = Adapter(LORA).merge({**items["params"], **lora["base"], "lora": lora["factors"]})
    params, base = named_leaves(items["params"]), named_leaves(lora["base"])
    assert sorted(base) == sorted(TARGETS)
    for name, kernel in named_leaves({"model": whole["model"]}).items():
        if name in base:
            np.testing.assert_allclose(params[name], kernel, atol=1e-6)
            assert np.abs(params[name] - base[name]).max() > 1e-4
    # Frozen kernels did not move from one checkpoint to the next.
    before = saved_items(folder, 2)
    frozen = [n for n in params if n not in TARGETS and "projection" not in n and "log_scale" not in n]
    assert frozen
    for name in frozen:
        np.testing.assert_array_equal(params[name], named_leaves(before["params"])[name])
    assert_same_trees(before["rest"]["lora"]["base"], lora["base"])
    # Loading knows nothing of it: the moving average is evaluated.
    loaded = bvl.load(str(folder))
    assert_same_trees(jax.tree.map(np.asarray, loaded.params), items["ema"])
    assert loaded.embed_texts(["a scan"]).shape == (1, 16)


def test_a_resume_is_exact(adapted_run, tmp_path):
    """From the middle to the end: the same run bit for bit."""
    config, folder = adapted_run
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "4")
    assert train(dataclasses.replace(config, workdir=str(copy))) == 0
    assert_same_runs(copy, folder)


def test_the_factors_start_on_another_model(adapted_run, tmp_path):
    """At a rate of nothing the merged parameters are those of the other run, as it would be loaded."""
    config, folder = adapted_run
    optim = dataclasses.replace(config.optim, lr=1e-30, ema_decay=0.0, weight_decay=0.0)
    config = dataclasses.replace(
        config, steps=1, seed=5, optim=optim, init_from=str(folder), workdir=str(tmp_path / "run")
    )
    assert train(config) == 0
    assert_same_trees(saved_items(tmp_path / "run")["params"], saved_items(folder)["params"])
