"""Optimisers: schedules, decay masks, learning rates and freezing by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, make_mesh, shardings_of, unbox
from bvl.models.layers import Stack
from bvl.train.optim import OptimConfig, make_optimizer, make_schedule
from bvl.train.parameters import merge, parameter_name

NAMES = ("adamw", "sgd", "lion", "adafactor", "lamb")


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
        updates, state = optimizer.transform.update(optimizer.split(grads)[0], state, trained, value=0.0)
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
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**options)


@pytest.mark.parametrize("name", ("adamw", "sgd"))
def test_decay_mask(name):
    """Matrices shrink, also those of a stack; biases, norms, positions and scalars do not."""
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
    config = OptimConfig(name=name, lr=0.1, warmup_steps=0, freeze=("^model/image/", "log_scale"))
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
    config = OptimConfig(name=name, warmup_steps=0, freeze=freeze, options={"min_dim_size_to_factor": 2} if name == "adafactor" else {})  # fmt: skip
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
