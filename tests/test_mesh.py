"""The mesh and its rules on one device; tests/sharded/test_mesh_sharded.py has them on eight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from bvl.errors import ConfigError
from bvl.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    check_batch_size,
    init_sharded,
    make_mesh,
    num_batch_shards,
    shardings_of,
    to_global,
    unbox,
)

# The shape of an error is found before any device is touched.
EIGHT = list(range(8))


def abstract_mesh(*shape):
    return AbstractMesh(shape, AXES)


def boxed(names, *shape):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)


@pytest.mark.parametrize(
    "shape, parts",
    [
        ((2, 2, 1), ["needs 4 devices, there are 8", "[1, 2, 4, 8]"]),
        ((-1, 3, 1), ["(-1, 3, 1)", "there are 8"]),
        ((-1, 16, 1), ["there are 8"]),
        ((-1, -1, 1), ["at most one of them -1"]),
        ((0, 8, 1), ["give 3 sizes"]),
        ((-2, 4, 1), ["give 3 sizes"]),
        ((8, 1), ["give 3 sizes", "tensor"]),
    ],
)
def test_bad_mesh_shapes(shape, parts):
    with pytest.raises(ConfigError) as error:
        make_mesh(MeshConfig(shape), devices=EIGHT)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} and num_batch_shards(mesh) == 1


@pytest.mark.parametrize(
    "batch_size, hosts, match",
    [
        (12, 1, "batch_size=12 cannot be split over 8 batch shards.*use 8 or 16"),
        (3, 1, "use 8$"),
        (24, 16, "batch_size=24 cannot be split over 16 hosts; use 16 or 32"),
    ],
)
def test_batch_sizes_that_do_not_split(batch_size, hosts, match):
    with pytest.raises(ConfigError, match=match):
        check_batch_size(batch_size, abstract_mesh(2, 4, 1), hosts)


def test_batch_sizes_that_split():
    check_batch_size(24, abstract_mesh(2, 4, 1), 2)
    check_batch_size(2, abstract_mesh(1, 2, 4), 1)
    assert num_batch_shards(abstract_mesh(2, 4, 3)) == 8


def test_rules():
    mesh = abstract_mesh(1, 2, 4)
    tree = {
        "kernel": boxed(("embed", "mlp"), 8, 16),
        "odd": boxed(("embed", "mlp"), 7, 16),
        "twice": boxed(("mlp", "heads"), 8, 8),
        "stacked": boxed(("layers", "embed"), 4, 8),
        "free": boxed((None, "embed"), 8, 8),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    }
    specs = {name: sharding.spec for name, sharding in shardings_of(tree, mesh).items()}
    assert specs == {
        "kernel": PartitionSpec("fsdp", "tensor"),
        # What does not divide stays whole, and an axis serves one dimension.
        "odd": PartitionSpec(None, "tensor"),
        "twice": PartitionSpec("tensor", None),
        "stacked": PartitionSpec(None, "fsdp"),
        "free": PartitionSpec(None, "fsdp"),
        "scalar": PartitionSpec(),
    }


def test_a_name_without_a_rule():
    with pytest.raises(ConfigError, match=r"kernel.*logical axis 'channels'.*LOGICAL_RULES"):
        shardings_of({"kernel": boxed(("embed", "channels"), 8, 8)}, abstract_mesh(1, 2, 4))


def test_init_and_batches_on_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])

    def init(key):
        return {"w": nn.Partitioned(jax.random.normal(key, (4, 2)), ("embed", "mlp")), "s": jnp.ones(())}

    tree, shardings = init_sharded(init, mesh, jax.random.key(0))
    np.testing.assert_allclose(tree["w"], init(jax.random.key(0))["w"].value, rtol=1e-6)
    assert jax.tree.structure(tree) == jax.tree.structure(shardings)
    assert unbox({"a": boxed(("embed",), 3)})["a"].shape == (3,)
    batch = to_global({"image": np.arange(6, dtype=np.uint8).reshape(3, 2)}, mesh)
    assert batch["image"].dtype == jnp.uint8 and batch_sharding(mesh).spec == PartitionSpec(BATCH_AXES)
    np.testing.assert_array_equal(batch["image"], [[0, 1], [2, 3], [4, 5]])
