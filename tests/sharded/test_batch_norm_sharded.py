"""Synced batch norm on 8 devices is that of the whole batch on one."""

import jax
import jax.numpy as jnp
import numpy as np

from bvl.mesh import MeshConfig, batch_sharding, make_mesh, replicated, unbox
from bvl.models.resnet import ResNetConfig


def test_eight_devices_equal_one():
    model = ResNetConfig("RN50", width=4, stages=(1, 1, 1, 1)).make(image_size=(32, 32), dtype=jnp.float32)
    image = jax.random.normal(jax.random.key(1), (16, 32, 32, 3)) + jnp.arange(16).reshape(-1, 1, 1, 1)
    keys = jax.random.split(jax.random.key(2), 16)
    params = unbox(jax.jit(model.init)(jax.random.key(0), image[:1]))
    weights = jax.random.normal(jax.random.key(3), (16, 128))

    @jax.jit
    def run(params, image, keys):
        def loss(params):
            out, state = model.apply(params, image, keys=keys, mutable=["statistics"])
            return (out.pooled * weights).sum(), (out.pooled, state)

        return jax.grad(loss, has_aux=True)(params)

    want = jax.device_get(run(params, image, keys))
    mesh = make_mesh(MeshConfig())
    rows = batch_sharding(mesh)
    put = jax.device_put
    got = run(put(params, replicated(mesh)), put(image, rows), put(keys, rows))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        # Some gradients are 0 but for rounding, such as those of the keys' bias.
        bound = 1e-4 * max(float(np.abs(b).max()), 0.1)
        np.testing.assert_allclose(a, b, atol=bound, rtol=0, err_msg=jax.tree_util.keystr(path))
