"""The mesh and its rules on one device; tests/sharded/test_mesh_sharded.py has them on eight."""

import math
import types

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
    check_hosts,
    init_sharded,
    make_mesh,
    num_batch_shards,
    shardings_of,
    share_of_host,
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
    "batch_size, match",
    [(12, "batch_size=12 cannot be split over 8 batch shards.*use 8 or 16"), (3, "use 8$")],
)
def test_batch_sizes_that_do_not_split(batch_size, match):
    with pytest.raises(ConfigError, match=match):
        check_batch_size(batch_size, abstract_mesh(2, 4, 1))


def test_batch_sizes_that_split():
    check_batch_size(24, abstract_mesh(2, 4, 1))
    check_batch_size(2, abstract_mesh(1, 2, 4))
    assert num_batch_shards(abstract_mesh(2, 4, 3)) == 8


def mesh_of_hosts(shape, hosts):
    """A mesh of devices that know their host alone."""
    size = math.prod(shape)
    devices = np.array([types.SimpleNamespace(process_index=i * hosts // size) for i in range(size)])
    return types.SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize(
    "shape, hosts, shares",
    [
        ((8, 1, 1), 2, [(0, 2), (1, 2)]),
        ((2, 2, 2), 2, [(0, 2), (1, 2)]),
        ((1, 2, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 8), 2, [(0, 1), (0, 1)]),
        ((4, 2, 1), 1, [(0, 1)]),
    ],
)
def test_the_rows_of_a_host_are_those_of_its_devices(shape, hosts, shares):
    mesh = mesh_of_hosts(shape, hosts)
    assert [share_of_host(mesh, host) for host in range(hosts)] == shares


def test_hosts_whose_rows_are_no_equal_part():
    # Six devices on two hosts: the second of three batch shards lies on both.
    with pytest.raises(
        ConfigError, match=r"host 0 hold the batch shards \[0, 1\] of 3.*use sizes that divide"
    ):
        share_of_host(mesh_of_hosts((3, 1, 2), 2), 0)


def test_a_config_for_other_hosts_than_started():
    check_hosts(MeshConfig(), 3)
    check_hosts(MeshConfig(hosts=3), 3)
    with pytest.raises(ConfigError, match="mesh.hosts=4, but 1 process.*start 4 .*or set mesh.hosts=1"):
        check_hosts(MeshConfig(hosts=4), 1)
    with pytest.raises(ConfigError, match="hosts=0: must be at least 1"):
        MeshConfig(hosts=0)


def test_rules():
    mesh = abstract_mesh(1, 2, 4)
    tree = {
        "kernel": boxed(("embed", "mlp"), 8, 16),
        "odd": boxed(("embed", "mlp"), 7, 16),
        "stacked": boxed(("layers", "embed"), 4, 8),
        "free": boxed((None, "embed"), 8, 8),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    }
    specs = {name: sharding.spec for name, sharding in shardings_of(tree, mesh).items()}
    assert specs == {
        "kernel": PartitionSpec("fsdp", "tensor"),
        # What does not divide stays whole.
        "odd": PartitionSpec(None, "tensor"),
        "stacked": PartitionSpec(None, "fsdp"),
        "free": PartitionSpec(None, "fsdp"),
        "scalar": PartitionSpec(),
    }


@pytest.mark.parametrize("size", [8, 7])
def test_two_axes_on_one_axis_of_the_mesh(size):
    """Also where one of them would not divide: whether a table is right may not hang on sizes."""
    tree = {"layer": {"kernel": boxed(("mlp", "heads"), 8, size)}}
    with pytest.raises(ConfigError, match=r"layer.*kernel.*'mlp' and 'heads'.*mesh axis 'tensor'"):
        shardings_of(tree, abstract_mesh(1, 2, 4))


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
