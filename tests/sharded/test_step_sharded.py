"""One training step of three tasks: the same on one device and on meshes of eight."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from test_step import (
    LARGE,
    SGD,
    TASKS,
    build,
    data,
    fast_compilation,  # noqa: F401
    make_program,
    one_device,
    start,
)

from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, make_mesh, to_global
from bvl.tasks.contrastive import Contrastive

pytestmark = pytest.mark.usefixtures("fast_compilation")


def one_step(mesh):
    """(metrics, change of the parameters under SGD, extra state, state) of one step."""
    state, step = start(make_program(TASKS, mesh=mesh, ema_decay=0.5), optim=SGD)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, data()[1][0])
    change = jax.tree.map(lambda b, a: (b - np.asarray(a)) / SGD.lr, before, state.params)
    return jax.tree.map(np.asarray, metrics), change, jax.tree.map(np.asarray, state.extra), state


@pytest.fixture(scope="module")
def expected(fast_compilation):  # noqa: F811
    return one_step(one_device())


def assert_close(actual, expected, scale):
    """max |a - b| / max |b| of every array; arrays that are all but zero are measured by the largest of all."""
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-2 * scale)
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)}: {error:.2e}"


def test_a_step_on_eight_devices(expected, shape=(2, 2, 2)):
    """Other meshes are in test_equal_steps.py, with fewer tasks."""
    metrics, gradient, extra, state = one_step(make_mesh(MeshConfig(shape)))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    assert_close(metrics, expected[0], 0.0)
    assert_close(gradient, expected[1], largest)
    assert_close(extra, expected[2], 1.0)
    kernel = state.params["model"]["image"]["stack"]["block_0"]["mlp"]["up"]["kernel"]
    parts = shape[1] * shape[2]
    assert kernel.addressable_shards[0].data.size * parts == kernel.size, (
        "parameters are split as the mesh says"
    )


def microbatched_step(mesh):
    """(metrics, gradient, compiled program's text) of a step in two microbatches, with dropout, a frozen tower and a task
    that compares rows, in groups that are drawn from the whole batch."""
    tasks = {"labels": TASKS["labels"], "pairs": Contrastive(groups=2)}
    program = make_program(tasks, mesh=mesh, image={"dropout": 0.3})
    optim = dataclasses.replace(SGD, lr=LARGE, accumulate=2, freeze=("^model/text/",))
    state, step, _ = build(program, optim=optim)
    batch = to_global(data()[1][0], mesh)
    compiled = step.lower(state, {}, batch).compile()
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = compiled(state, {}, batch)
    gradient = jax.tree.map(lambda b, a: (b - np.asarray(a)) / LARGE, before, state.params)
    return jax.tree.map(np.asarray, metrics), gradient, compiled.as_text()


def test_microbatches_on_eight_devices():
    """The same as on one device, masks included, and no row of pixels leaves its device."""
    expected = microbatched_step(one_device())
    metrics, gradient, text = microbatched_step(make_mesh(MeshConfig((2, 2, 2))))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    assert_close(metrics, expected[0], 0.0)
    assert_close(gradient, expected[1], largest)
    moved = re.findall(r"= u8\[[\d,]*\]\S* (?:all-gather|all-to-all|collective-permute)", text)
    assert not moved, moved


def test_microbatches_smaller_than_the_mesh():
    with pytest.raises(ConfigError, match="batch_size=8 cannot be split.*use a multiple of 16"):
        microbatched_step(make_mesh(MeshConfig((8, 1, 1))))
