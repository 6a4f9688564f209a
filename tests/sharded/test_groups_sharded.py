"""Contrastive losses in groups on 8 devices: the values and gradients of the naive twins, with less to send."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive_loss import BIAS, FAST_COMPILE, LOSSES, SCALE, assert_equal, features, random_mask

from bvl.errors import ConfigError
from bvl.losses.contrastive import softmax_loss
from bvl.losses.groups import draw_groups, into_groups, rows_of_groups
from bvl.losses.targets import same_text
from bvl.mesh import MeshConfig, batch_sharding, make_mesh

ROWS, TEXTS = 64, 2


def inputs():
    image, text = features(0, ROWS, 16), features(1, ROWS * TEXTS, 16)
    text = text + np.repeat(image, TEXTS, axis=0)
    valid = random_mask(1, ROWS), random_mask(2, ROWS * TEXTS)
    image[~valid[0]], text[~valid[1]] = np.nan, np.nan
    ids = np.random.default_rng(0).integers(0, 20, (ROWS, TEXTS)).astype(np.uint32)
    return image, text, *valid, ids


def in_groups(groups, mesh=None):
    """({loss: it and its gradients by image, text, scale and bias}, compiled program) of a batch that is drawn into
    groups; without a mesh the naive twins over rows that are looked up one by one."""
    image, text, image_valid, text_valid, ids = inputs()
    targets = same_text(ids, ids.reshape(-1))
    order = draw_groups(jax.random.key(3), ROWS, groups)

    def call(image, text, scale, bias, loss):
        rows, cols = (image, image_valid, targets.rows), (text, text_valid, targets.cols)
        if mesh is None:
            index = rows_of_groups(order)
            texts = (index[:, None] * TEXTS + jnp.arange(TEXTS)).reshape(-1)
            rows = jax.tree.map(lambda x: jnp.asarray(x)[index], rows)
            cols = jax.tree.map(lambda x: jnp.asarray(x)[texts], cols)
            options = {}
        else:
            rows = into_groups(jax.tree.map(jnp.asarray, rows), order, mesh=mesh)
            cols = into_groups(jax.tree.map(jnp.asarray, cols), order, mesh=mesh, each=TEXTS)
            options = dict(mesh=mesh, chunk_size=5)
        of_groups = dataclasses.replace(targets, rows=rows[2], cols=cols[2])
        options |= dict(targets=of_groups, image_valid=rows[1], text_valid=cols[1], groups=groups)
        if loss == "sigmoid":
            options["bias"] = bias
        return LOSSES[loss][mesh is None](rows[0], cols[0], scale=scale, **options)

    arguments = [jnp.asarray(image), jnp.asarray(text), jnp.float32(SCALE), jnp.float32(BIAS)]
    if mesh is not None:
        arguments[:2] = (jax.device_put(x, batch_sharding(mesh)) for x in arguments[:2])
    each = {loss: jax.value_and_grad(partial(call, loss=loss), argnums=(0, 1, 2, 3)) for loss in LOSSES}
    step = jax.jit(lambda *x: {loss: function(*x) for loss, function in each.items()})
    compiled = step.lower(*arguments).compile(FAST_COMPILE)
    names = ("value", "image", "text", "scale", "bias")
    found = {
        loss: dict(zip(names, (value, *gradients), strict=True))
        for loss, (value, gradients) in compiled(*arguments).items()
    }
    return found, compiled.as_text()


# The last mesh has 2 batch shards, each of which holds 2 groups; the loss is that of the same groups elsewhere.
@pytest.mark.parametrize("groups, shape", [(1, (4, 2, 1)), (2, (4, 2, 1)), (8, (4, 2, 1)), (4, (2, 1, 4))])
def test_groups_equal_naive(groups, shape):
    expected, _ = in_groups(groups)
    actual, text = in_groups(groups, make_mesh(MeshConfig(shape)))
    for loss in LOSSES:
        assert_equal(actual[loss], expected[loss])
    gathered = re.findall(r"= [a-z]+\d+\[[\d,]*\]\S* all-gather", text)
    assert not gathered, "rows are sent to their group alone"
    # With a group a device there is no ring.
    assert ("collective-permute" in text) == (groups < shape[0] * shape[1])


def test_groups_that_do_not_fit_the_devices():
    mesh = make_mesh()
    x = features(0, 96, 4)
    with pytest.raises(
        ConfigError, match=r"groups=3 does not fit 8 batch shard.*\[1, 2, 4, 8\], or a multiple of 8"
    ):
        softmax_loss(x, x, scale=1.0, mesh=mesh, groups=3)
    with pytest.raises(
        ConfigError, match="a batch of 16 rows cannot be drawn into groups=4 on 8.*multiple of 32"
    ):
        into_groups(x[:16], draw_groups(jax.random.key(0), 16, 4), mesh=mesh)
