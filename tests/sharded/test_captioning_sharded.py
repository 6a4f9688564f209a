"""Captions and their loss: the same on one device and on meshes of eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PHANTOMS, tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.data.phantoms import PhantomSource
from bvl.decode.options import DecodeOptions
from bvl.losses.caption import next_token_loss
from bvl.mesh import MeshConfig, batch_sharding, make_mesh
from bvl.runs import Encoder
from bvl.tasks.captioning import encode_for_captions, write_captions

pytestmark = pytest.mark.usefixtures("fast_compilation")


def on_mesh(components, mesh):
    """The components with every parameter split where its first axis divides, as in training."""

    def place(x):
        shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
        spec = ("fsdp", "tensor") if x.ndim and x.shape[0] % shards == 0 else None
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(spec) if x.ndim else jax.P()))

    params = jax.tree.map(place, components.params)
    encoder = Encoder(components.model, components.preprocess, mesh)
    return dataclasses.replace(components, params=params, encoder=encoder)


def test_captions_on_eight_devices():
    """Guided ones, three images in a batch that is filled up to the mesh's four batch shards."""
    components = tiny_components(captions=True)
    source = PhantomSource(PHANTOMS)
    images = [source[i]["image"] for i in range(3)]
    encoded = encode_for_captions(components, images, batch_size=3)

    def written(components):
        return write_captions(
            components,
            encoded,
            options=DecodeOptions(max_length=4, beams=2),
            guidance=[0.5, 2.0, 3.0],
            batch_size=3,
        )

    expected = written(components)
    found = written(on_mesh(components, make_mesh(MeshConfig((2, 2, 2)))))
    assert [row[0].tokens for row in found] == [row[0].tokens for row in expected]
    np.testing.assert_allclose([row[0].score for row in found], [row[0].score for row in expected], rtol=1e-5)


def test_the_loss_on_eight_devices():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (16, 40))
    targets, weights = jnp.asarray(rng.integers(0, 40, 16)), jnp.asarray(rng.random(16), jnp.float32)

    @jax.jit
    def value_and_gradient(hidden, table, targets, weights):
        loss = lambda h, t: next_token_loss(h, t, targets, weights, label_smoothing=0.1, chunk_size=16)[0]  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(hidden, table)

    expected = value_and_gradient(hidden, table, targets, weights)
    mesh = make_mesh(MeshConfig((2, 2, 2)))
    rows = [jax.device_put(x, batch_sharding(mesh)) for x in (hidden, targets, weights)]
    split = jax.device_put(table, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
    found = value_and_gradient(rows[0], split, *rows[1:])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
