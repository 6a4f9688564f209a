"""Training on meshes of 8 devices and on one: loss and gradient at equal parameters, and the same curve in float64."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import data, fast_compilation, make_program, one_device  # noqa: F401

from bvl.mesh import MeshConfig, make_mesh, on_mesh, place, shardings_of, split_rows, unbox, whole
from bvl.tasks.contrastive import Contrastive
from bvl.train.collectives import Program as Hlo
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("fast_compilation")

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
STEPS = 50
COMPARED = (1, 10, 50)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=5)


def mesh_of(shape):
    """shape None: one device."""
    return one_device() if shape is None else make_mesh(MeshConfig(shape))


def a_program(shape, dtype):
    program = make_program({"pairs": Contrastive()}, mesh=mesh_of(shape), image={"scan": True})
    return dataclasses.replace(
        program, model=program.model.clone(dtype=dtype), info=dataclasses.replace(program.info, dtype=dtype)
    )


def batch(number, mesh):
    """The first two batches are trained on. The gradient of the third, which no step sees, does not vanish, so that
    rounding stays small beside it."""
    return {key: split_rows(rows, mesh) for key, rows in data()[1][number].items()}


def attention(query, key, value, *, mask, is_causal):
    """`jax.nn.dot_product_attention`, whose softmax is in float32 whatever it is given."""
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(query.shape[-1])
    if is_causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -1e30))
    return jnp.einsum("bhqk,bkhc->bqhc", weights, value)


@contextlib.contextmanager
def float64():
    """All in float64, also what is float32 whatever the precision, as norms and losses are."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(jax.nn, "dot_product_attention", attention)
        yield


@functools.cache
def fresh_state():
    """(state, its shapes with the names of their axes, optimizer) in float64."""
    program, key = a_program(None, jnp.float64), jax.random.key(0)
    optimizer = make_optimizer(OPTIM, STEPS, unbox(jax.eval_shape(program.init_params, key)))
    init = functools.partial(program.init_state, optimizer=optimizer)
    return jax.device_get(jax.jit(lambda key: unbox(init(key)))(key)), jax.eval_shape(init, key), optimizer


@functools.cache
def curve(shape):
    """(losses of all steps, parameters after those that are COMPARED) of a run in float64."""
    with float64():
        state, boxed, optimizer = fresh_state()
        program = a_program(shape, jnp.float64)
        shardings = shardings_of(boxed, program.mesh)
        step = make_train_step(program, optimizer, shardings)
        state, losses, params = place(state, shardings), [], {}
        for i in range(1, STEPS + 1):
            state, metrics = step(state, {}, batch(i % 2, program.mesh))
            losses.append(np.asarray(metrics["step"]["loss"][0]))
            if i in COMPARED:
                params[i] = jax.tree.map(whole, state.params)
        return np.stack(losses), params


@functools.cache
def evaluated(shape):
    return evaluate(shape, curve(None)[1])


def evaluate(shape, reference):
    """(step -> (loss, gradients) in float32 at the parameters that a run on one device had after that step, program)."""
    program, boxed = a_program(shape, jnp.float32), fresh_state()[1]
    params_shardings = shardings_of(boxed.params, program.mesh)
    extra = {name: task.init_extra(program.info) for name, task in program.tasks.items()}

    @on_mesh(program.mesh)
    def value_and_grad(params, batch):
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
        batch = program.prepare(batch, key)
        loss = lambda params: program.loss(params, extra, {}, batch, key, step)[0]  # noqa: E731
        return jax.value_and_grad(loss)(params)

    def at(params):
        return place(jax.tree.map(np.float32, params), params_shardings), batch(2, program.mesh)

    jitted = jax.jit(value_and_grad, out_shardings=(None, params_shardings))
    compiled = jitted.lower(*at(reference[1])).compile()
    return {i: jax.tree.map(whole, compiled(*at(params))) for i, params in reference.items()}, compiled


@pytest.mark.parametrize("shape", MESHES)
def test_loss_and_gradient_at_equal_parameters(shape):
    for step in COMPARED:
        (loss, gradients), (expected, expected_gradients) = (
            evaluated(shape)[0][step],
            evaluated(None)[0][step],
        )
        assert loss.dtype == np.float32 and abs(loss - expected) <= 1e-5 * abs(expected), step
        largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_gradients))
        for (path, b), a in zip(
            jax.tree_util.tree_leaves_with_path(expected_gradients), jax.tree.leaves(gradients), strict=True
        ):
            # The softmax does not see a bias of keys: its gradient is rounding alone.
            scale = max(
                np.abs(b).max(),
                1e-2 * largest if jax.tree_util.keystr(path).endswith("['key']['bias']") else 0,
            )
            error = np.abs(a - b).max() / scale
            assert error <= 1e-5, f"step {step}, {jax.tree_util.keystr(path)}: {error:.2e}"


def test_tensor_parallel_layers():
    """On (2, 2, 2): kernels are gathered over fsdp, and activations summed over tensor, as Megatron-LM has it
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3): twice a layer forward, twice backward."""
    compiled = Hlo(evaluated((2, 2, 2))[1].as_text()).collectives()
    summed = [x.shape for c in compiled if c.kind == "all-reduce" and c.group_size == 2 for x in c.types]
    # Two rows a device, of 4 patches and of 16 tokens, at width 32; backward once for the MLP, once for each of queries,
    # keys and values.
    for tokens in (4, 16):
        assert summed.count((2 * tokens, 32)) == 2 + 1 + 3
    gathered = {x.shape for c in compiled if c.kind == "all-gather" for x in c.types}
    assert {(32, 16), (32, 64), (64, 32)} <= gathered
    assert not {(32, 32), (32, 128), (128, 32)} & gathered, "no device has a whole kernel"


def test_the_curve_of_50_steps_in_float64(shape=MESHES[-1]):
    (losses, params), (expected, expected_params) = curve(shape), curve(None)
    assert losses.dtype == np.float64 and expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(params[STEPS]), jax.tree.leaves(expected_params[STEPS]), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1e-3))
