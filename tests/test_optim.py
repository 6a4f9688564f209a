"""Optimisers: schedules, decay masks, learning rates and freezing by name."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, make_mesh, shardings_of, unbox
from bvl.models.hybrid import HybridConfig
from bvl.models.layers import Stack
from bvl.models.resnet import ResNetConfig
from bvl.train.optim import OptimConfig, make_optimizer, make_schedule
from bvl.train.parameters import layer_factors, merge, parameter_name

pytestmark = pytest.mark.usefixtures("fast_compilation")

NAMES = (
    "adamw",
    "sgd",
    "lion",
    "adafactor",
    "lamb",
    "contrib.muon",
    "contrib.schedule_free_adamw",
    "contrib.momo",
)


def config_of(name, **changes):
    """Schedule-free optimisers take no decaying schedule."""
    return OptimConfig(name=name, **{"schedule": "constant", "warmup_steps": 0} | changes)


def boxed(value, *names):
    return nn.Partitioned(jnp.asarray(value, jnp.float32), names)


def make_params():
    """Parameters as `init` gives them: boxed, a plain block, a stack of three, and a scalar."""
    rng = np.random.default_rng(0)
    return {
        "model": {
            "image": {
                "block_0": {"kernel": boxed(rng.normal(size=(4, 6)), "embed", "mlp"), "bias": boxed(np.ones(6), "mlp")},
                "stack": {"blocks": {"kernel": boxed(rng.normal(size=(3, 4, 6)), "layers", "embed", "mlp"),
                                     "bias": boxed(np.ones((3, 6)), "layers", "mlp")}},
                "positions": boxed(rng.normal(size=(5, 4)), "position", "embed"),
            },
            "log_scale": jnp.ones(()),
        },
        "heads": {"classify": {"linear": {"kernel": boxed(rng.normal(size=(4, 2)), "embed", "classes")}}},
    }  # fmt: skip


def step(config, params, grads, *, steps=10, count=1):
    """Parameters after `count` steps with the same gradient."""
    optimizer = make_optimizer(config, steps, params)
    trained, frozen = optimizer.split(params)
    state = optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.transform.update(optimizer.split(grads)[0], state, trained, value=1.0)
        trained = optax.apply_updates(trained, updates)
    return merge(trained, frozen)


def moved(before, after):
    """name -> largest change."""
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    return {parameter_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(change)}


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


@pytest.mark.parametrize(
    "schedule, middle, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedule(schedule, middle, end):
    lr = make_schedule(OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10, final_fraction=0.1), 110)
    values = [float(lr(i)) for i in range(111)]
    np.testing.assert_allclose(values[0], 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(values[9:11], [2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values[60], 2.0 * middle, rtol=1e-6)
    np.testing.assert_allclose(values[110], 2.0 * end, rtol=1e-6)
    assert np.all(np.diff(values[:10]) > 0) and np.all(np.diff(values[10:]) <= 0)


def test_inverse_square_root():
    """lr * sqrt(timescale / (timescale + t)), t steps after the warm-up: half the rate after 3 timescales."""
    lr = make_schedule(OptimConfig(lr=2.0, schedule="rsqrt", warmup_steps=10, timescale=20), 1000)
    np.testing.assert_allclose([lr(9), lr(10), lr(70), lr(310)], [2.0, 2.0, 1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("schedule", ("cosine", "linear", "constant", "rsqrt"))
def test_cool_down(schedule):
    """The schedule as it is without, then a straight line to the final rate."""
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10, timescale=20, final_fraction=0.05)
    plain = make_schedule(config, 100)
    lr = make_schedule(dataclasses.replace(config, cooldown_steps=20), 100)
    for step in (0, 9, 10, 50, 80):
        np.testing.assert_allclose(lr(step), plain(step), rtol=1e-6)
    np.testing.assert_allclose(lr(90), (float(plain(80)) + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(lr(100), 0.1, rtol=1e-6)


def test_cool_down_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps=10 and cooldown_steps=91.*optim.cooldown_steps=45"):
        make_schedule(OptimConfig(schedule="constant", warmup_steps=10, cooldown_steps=91), 100)


@pytest.mark.parametrize("warmup, first", [(0, 2.0), (1, 2.0), (2, 1.0)])
def test_short_warm_up(warmup, first):
    lr = make_schedule(OptimConfig(lr=2.0, warmup_steps=warmup), 10)
    assert float(lr(0)) == first and float(lr(warmup)) == 2.0 and float(lr(10)) == 0.0


def test_warm_up_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps=100 leaves no step of 50.*optim.warmup_steps=5"):
        make_schedule(OptimConfig(warmup_steps=100), 50)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="adamww"), "nearest is 'adamw'"),
        (dict(lr=0.0), "lr=0.0"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
        (dict(clip_norm=0.0), "clip_norm=0.0"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
        (dict(weight_decay=-0.1), "weight_decay=-0.1"),
        (dict(final_fraction=1.5), "final_fraction=1.5"),
        (dict(freeze=("(",)), "no regular expression"),
        (dict(name="contrib.muonn"), "nearest is 'contrib.muon'"),
        (dict(layer_decay=0.0), "layer_decay=0.0"),
        (dict(accumulate=0), "accumulate=0"),
        (dict(cooldown_steps=-1), "cooldown_steps=-1"),
        (dict(name="contrib.schedule_free_sgd"), "optim.schedule='constant'"),
        (dict(name="contrib.schedule_free_sgd", schedule="constant", ema_decay=0.9), "optim.ema_decay=0"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**options)


@pytest.mark.parametrize("name", ("adamw", "sgd", "lion", "adafactor", "contrib.muon"))
def test_decay_mask(name):
    """Matrices shrink by lr * weight_decay, also those of a stack; biases, norms, positions and scalars do not."""
    params = unbox(make_params())
    config = OptimConfig(
        name=name, lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=None
    )
    after = step(config, params, zeros(params))
    for name, (old, new) in zip(
        moved(params, after), zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True), strict=True
    ):
        np.testing.assert_allclose(
            new, old * (0.95 if name.endswith("kernel") else 1.0), rtol=1e-6, err_msg=name
        )
    after = step(OptimConfig(name="sgd", warmup_steps=0, no_decay=("blocks/",)), params, zeros(params))
    assert moved(params, after)["model/image/stack/blocks/kernel"] == 0


def test_a_scanned_stack_is_named_as_the_mask_expects():
    """Same decay for a stack that is scanned and one that is not."""
    decayed = {}
    for scan in (False, True):
        stack = Stack(depth=2, num_heads=2, mlp_hidden=8, scan=scan)
        shapes = jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((1, 3, 4)))
        params = {"model": {"stack": jax.tree.map(lambda x: jnp.ones(x.shape), unbox(shapes["params"]))}}
        after = step(OptimConfig(name="sgd", lr=1.0, warmup_steps=0, weight_decay=0.5), params, zeros(params))
        decayed[scan] = {
            n.replace("block_0", "blocks")
            for n, d in moved(params, after).items()
            if d and "block_1" not in n
        }
    assert decayed[True] == decayed[False]
    assert "model/stack/blocks/mlp/up/kernel" in decayed[True]
    assert all(n.endswith("kernel") for n in decayed[True])


def test_decay_within_the_trust_ratio():
    """LAMB: the decayed update has the parameter's norm, so that a step without gradient shrinks it by lr."""
    params = unbox(make_params())
    after = step(config_of("lamb", lr=0.1, weight_decay=0.5, clip_norm=None), params, zeros(params))
    for name, (old, new) in zip(moved(params, after), zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True), strict=True):  # fmt: skip
        np.testing.assert_allclose(
            new, old * (0.9 if name.endswith("kernel") else 1.0), rtol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("name", ("adamw", "sgd", "lion", "adafactor", "lamb", "contrib.muon"))
def test_updates_follow_the_schedule(name):
    """The first step of a warm-up of ten moves a tenth of what it does without, decay included."""
    params = unbox(make_params())
    config = config_of(name, lr=1e-3, weight_decay=0.5)
    whole, tenth = (
        moved(params, step(dataclasses.replace(config, warmup_steps=w), params, ones(params), steps=100))
        for w in (0, 10)
    )
    for parameter, change in whole.items():
        np.testing.assert_allclose(tenth[parameter], 0.1 * change, rtol=2e-3, atol=1e-7, err_msg=parameter)


@pytest.mark.parametrize("name", ("adamw", "sgd", "lion"))
def test_learning_rate_by_name(name):
    params = unbox(make_params())
    config = OptimConfig(
        name=name, lr=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=None,
        lr_multipliers={"^heads/": 10.0, "image/": 0.5, "positions": 7.0},
    )  # fmt: skip
    change = moved(params, step(config, params, ones(params)))
    np.testing.assert_allclose(change["heads/classify/linear/kernel"], 1.0, rtol=1e-4)
    np.testing.assert_allclose(change["model/image/block_0/kernel"], 0.05, rtol=1e-4)
    np.testing.assert_allclose(change["model/image/positions"], 0.05, rtol=1e-4)  # the first match counts
    np.testing.assert_allclose(change["model/log_scale"], 0.1, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_freezing(name):
    """No update, and no memory of the optimiser."""
    params = unbox(make_params())
    config = config_of(name, lr=0.1, freeze=("^model/image/", "log_scale"))
    optimizer = make_optimizer(config, 10, params)
    assert not [x.shape for x in jax.tree.leaves(optimizer.init(params)) if x.shape[-2:] in ((4, 6), (5, 4))]
    change = moved(params, step(config, params, ones(params), count=2))
    assert {n for n, d in change.items() if d == 0} == {n for n in change if not n.startswith("heads/")}


def test_freezing_leaves_frozen_gradients_out_of_the_clip():
    params = unbox(make_params())
    grads = ones(params) | {"heads": jax.tree.map(lambda x: x * 0.1, ones(params["heads"]))}
    config = OptimConfig(
        name="sgd", lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.5, freeze=("^model/",)
    )
    change = moved(params, step(config, params, grads))
    np.testing.assert_allclose(change["heads/classify/linear/kernel"], 0.1, rtol=1e-4)


@pytest.mark.parametrize("option", [dict(freeze=("vision/",)), dict(lr_multipliers={"vision/": 2.0})])
def test_a_pattern_without_a_parameter(option):
    with pytest.raises(ConfigError, match=r"'vision/' matches no parameter.*heads/classify/linear/kernel"):
        make_optimizer(OptimConfig(warmup_steps=0, **option), 10, make_params())


def test_clip():
    params = unbox(make_params())
    size = sum(x.size for x in jax.tree.leaves(params))
    config = OptimConfig(name="sgd", lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=2.0)
    change = moved(params, step(config, params, ones(params)))
    np.testing.assert_allclose(list(change.values()), 2.0 / np.sqrt(size), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("freeze", [(), ("^model/image/",)])
def test_every_optimizer_constructs_places_and_steps(name, freeze):
    """Through boxed parameters, as the loop makes a state: every array of the state has a sharding."""
    params = make_params()
    config = config_of(
        name, freeze=freeze, options={"min_dim_size_to_factor": 2} if name == "adafactor" else {}
    )
    optimizer = make_optimizer(config, 10, unbox(params))
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shardings = shardings_of(jax.eval_shape(lambda p: optimizer.init(p), params), mesh)
    state = jax.jit(lambda p: unbox(optimizer.init(p)), out_shardings=shardings)(params)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(unbox(params)))
    change = moved(unbox(params), step(config, unbox(params), ones(unbox(params))))
    assert change["heads/classify/linear/kernel"] > 0


def test_optimizer_options():
    params = unbox(make_params())
    make_optimizer(OptimConfig(warmup_steps=0, options={"b2": 0.95}), 10, params)
    with pytest.raises(ConfigError, match="optax.adamw does not take beta2; it takes .*b2"):
        make_optimizer(OptimConfig(warmup_steps=0, options={"beta2": 0.95}), 10, params)
    with pytest.raises(ConfigError, match="optax.global_norm"):
        make_optimizer(OptimConfig(name="global_norm", warmup_steps=0), 10, params)
    with pytest.raises(ConfigError, match="optax.contrib.muon does not take b2"):
        make_optimizer(OptimConfig(name="contrib.muon", warmup_steps=0, options={"b2": 0.95}), 10, params)


@pytest.mark.parametrize("name", ("lbfgs", "contrib.sophia", "contrib.mechanize"))
def test_optimizers_that_do_not_fit(name):
    """They want the loss as a function, or another optimiser."""
    with pytest.raises(ConfigError, match=f"optax.{name}"):
        make_optimizer(OptimConfig(name=name, warmup_steps=0), 10, unbox(make_params()))


def test_nothing_left_to_train():
    with pytest.raises(ConfigError, match="matches every parameter"):
        make_optimizer(OptimConfig(freeze=("/",)), 1000, unbox(make_params()))


def tower_shapes(scan):
    """Names and shapes of towers as the models make them, with a stack of two blocks."""
    stack = Stack(depth=2, num_heads=2, mlp_hidden=8, scan=scan)
    stack = unbox(jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((1, 3, 4))))["params"]
    vector = jax.ShapeDtypeStruct((4,), jnp.float32)
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    resnet = ResNetConfig("RN50", width=2, stages=(1, 1, 1, 2)).make(image_size=(32, 32), dtype=jnp.float32)
    resnet = unbox(jax.eval_shape(resnet.init, jax.random.key(0), jnp.ones((1, 32, 32, 3))))["params"]
    return {
        "model": {
            "image": resnet,
            "text": {"token_embed": matrix, "positions": matrix, "stack": stack, "norm": {"scale": vector}},
            "text_projection": {"kernel": matrix},
            "log_scale": jax.ShapeDtypeStruct((), jnp.float32),
        },
        "heads": {"classify": {"linear": {"kernel": matrix}}},
    }


@pytest.mark.parametrize("scan", (False, True))
def test_layer_wise_decay(scan):
    """1 at the top of a tower and outside, a factor less for each layer down; residual blocks are layers."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), tower_shapes(scan))
    config = OptimConfig(
        name="sgd", lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=None, layer_decay=0.5,
        lr_multipliers={"^model/text/.*bias$": 3.0},
    )  # fmt: skip
    after = step(config, params, ones(params))
    change = {parameter_name(path): -x for path, x in jax.tree_util.tree_leaves_with_path(after)}
    expected = {
        "model/text/token_embed": 0.125,
        "model/text/positions": 0.125,
        "model/text/norm/scale": 1.0,
        "model/text_projection/kernel": 1.0,
        "model/log_scale": 1.0,
        "heads/classify/linear/kernel": 1.0,
        "model/image/stem/conv_0/kernel": 0.5**6,
        "model/image/stage_0_block_0/middle_conv/kernel": 0.5**5,
        "model/image/stage_3_block_0/middle_conv/kernel": 0.25,
        "model/image/stage_3_block_1/middle_conv/kernel": 0.5,
        "model/image/pool/query/kernel": 1.0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(change[name], np.full_like(change[name], value), err_msg=name)
    for i, value in enumerate((0.25, 0.5)):
        prefix = "model/text/stack/" + ("blocks/" if scan else f"block_{i}/")
        for leaf, factor in (("mlp/up/kernel", 1.0), ("mlp/up/bias", 3.0), ("mlp_norm/scale", 1.0)):
            actual = change[prefix + leaf][i] if scan else change[prefix + leaf]
            np.testing.assert_allclose(actual, np.full_like(actual, factor * value), err_msg=prefix + leaf)


def test_layer_wise_decay_of_a_hybrid():
    """What embeds the patches stands between the convolutional stages and the transformer."""
    config = HybridConfig(widths=(4, 4, 8), depths=(1, 2, 2), num_heads=2)
    module = config.make(image_size=(32, 32), dtype=jnp.float32)
    params = unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 32, 32, 3))))["params"]
    leaves = jax.tree_util.tree_leaves_with_path({"model": {"image": params}})
    factors = layer_factors({parameter_name(path): x.shape for path, x in leaves}, 0.5)
    by_part = {name.split("/")[2]: factor for name, factor in factors.items()}
    assert by_part == {
        "stem_0": 0.5**6, "stem_norm": 0.5**6, "stem_1": 0.5**6,
        "stage_0_block_0": 0.5**5, "stage_1_block_0": 0.5**4, "stage_1_block_1": 0.5**3,
        "patch_norm": 0.25, "patch_embed": 0.25, "positions": 0.25,
        "stage_2_block_0": 0.25, "stage_2_block_1": 0.5, "norm": 1.0,
    }  # fmt: skip


def test_layer_wise_decay_of_a_captioner():
    """Pooling has the full rate whatever its kind; so has how a decoder sees, and its own layers stand one above
    the other."""
    shapes = {
        "model/image/cls": (4,), "model/image/stack/block_0/mlp/up/kernel": (4, 4),
        "model/image/attentional_pool/queries": (3, 4), "model/decoder/token_embed": (9, 4),
        "model/decoder/block_0/mlp/up/kernel": (4, 4), "model/decoder/block_1/mlp/up/kernel": (4, 4),
        "model/decoder/block_1/cross/query/kernel": (4, 4), "model/decoder/visual_tokens/null": (4,),
        "model/decoder/unimodal_norm/scale": (4,), "model/decoder/norm/scale": (4,), "model/decoder/head": (9, 4),
    }  # fmt: skip
    factors = layer_factors(shapes, 0.5)
    assert {name.removeprefix("model/"): factors.get(name, 1.0) for name in shapes} == {
        "image/cls": 0.25, "image/stack/block_0/mlp/up/kernel": 0.5, "image/attentional_pool/queries": 1.0,
        "decoder/token_embed": 0.125, "decoder/block_0/mlp/up/kernel": 0.25, "decoder/block_1/mlp/up/kernel": 0.5,
        "decoder/block_1/cross/query/kernel": 1.0, "decoder/visual_tokens/null": 1.0,
        "decoder/unimodal_norm/scale": 1.0, "decoder/norm/scale": 1.0, "decoder/head": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_schedule_free(name):
    """The same as optax's own without decay; with it, decay is masked; factors of the rate reach z."""
    params = unbox(make_params())
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params) for _ in range(3)]
    config = config_of(
        f"contrib.schedule_free_{name}", lr=0.1, weight_decay=0.0, clip_norm=None, options={"b1": 0.95}
    )
    ours = make_optimizer(config, 10, params)
    theirs = getattr(optax.contrib, f"schedule_free_{name}")(0.1, b1=0.95)
    a, b = (params, ours.init(params)), (params, theirs.init(params))
    for grad in grads:
        updates, state = ours.transform.update(grad, a[1], a[0], value=0.0)
        a = optax.apply_updates(a[0], updates), state
        updates, state = theirs.update(grad, b[1], b[0])
        b = optax.apply_updates(b[0], updates), state
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, a[0], b[0])
    jax.tree.map(close, ours.eval_params(a[1], a[0]), optax.contrib.schedule_free_eval_params(b[1], b[0]))

    after = step(dataclasses.replace(config, weight_decay=0.5), params, zeros(params))
    assert {n for n, d in moved(params, after).items() if d > 1e-5} == {
        n for n in moved(params, after) if n.endswith("kernel")
    }
    slow = make_optimizer(dataclasses.replace(config, lr_multipliers={"^model/": 0.0}), 10, params)
    updates, state = slow.transform.update(grads[0], slow.init(params), params, value=0.0)
    average = moved(params, slow.eval_params(state, optax.apply_updates(params, updates)))
    assert {n for n, d in average.items() if d > 1e-5} == {n for n in average if n.startswith("heads/")}


def test_muon_orthogonalises_each_layer_of_a_stack():
    """A stacked kernel moves as its layers do one by one; embeddings and vectors are left to Adam."""
    params = unbox(make_params())
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    config = config_of("contrib.muon", lr=1.0, weight_decay=0.0, clip_norm=None)
    after = step(config, params, grads)
    change = (
        after["model"]["image"]["stack"]["blocks"]["kernel"]
        - params["model"]["image"]["stack"]["blocks"]["kernel"]
    )
    for i in range(3):
        layer = {"model": {"kernel": jnp.zeros((4, 6))}}
        grad = {"model": {"kernel": grads["model"]["image"]["stack"]["blocks"]["kernel"][i]}}
        alone = step(config, layer, grad)["model"]["kernel"]
        np.testing.assert_allclose(change[i], alone, rtol=1e-3, atol=1e-4)
    # Adam's first step has the sign of the gradient and one size.
    positions = after["model"]["image"]["positions"] - params["model"]["image"]["positions"]
    np.testing.assert_array_equal(np.sign(positions), -np.sign(grads["model"]["image"]["positions"]))
    np.testing.assert_allclose(jnp.abs(positions), jnp.abs(positions[0, 0]), rtol=1e-4)
