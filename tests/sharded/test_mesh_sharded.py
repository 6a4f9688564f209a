"""A dual encoder on meshes of 8 devices: where its parameters lie, and that nothing but that changes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bvl.mesh import (
    BATCH_AXES,
    LOGICAL_RULES,
    MeshConfig,
    init_sharded,
    make_mesh,
    to_global,
)
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

BATCH = 16
RNG = np.random.default_rng(0)
HOST_BATCH = {
    "image": RNG.normal(size=(BATCH, 16, 16, 3)).astype(np.float32),
    "text": np.concatenate([RNG.integers(4, 64, (BATCH, 7)), np.full((BATCH, 1), 3)], 1).astype(np.int32),
}
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


@functools.cache
def make_model(pool="mean", scan=False, bias=None):
    return DualEncoder(
        DualEncoderConfig(
            image=ViTConfig("Ti/8", pool=pool, width=32, depth=1, num_heads=4, scan=scan, pre_norm=True),
            text=TextConfig(width=32, depth=1, num_heads=4, scan=scan),
            embed_dim=16,
            init_bias=bias,
        ),
        image_size=(16, 16),
        vocab_size=64,
        context_length=8,
        end_id=3,
    )


def initialise(key, model):
    batch = {k: v[:1] for k, v in HOST_BATCH.items()}
    return model.init(key, batch["image"], batch["text"], batch["text"] > 0)["params"]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def initialised(shape):
    """(parameters, shardings) on a mesh; shape None = one device."""
    mesh = one_device() if shape is None else make_mesh(MeshConfig(shape))
    return init_sharded(functools.partial(initialise, model=make_model()), mesh, jax.random.key(1))


@functools.cache
def start():
    return jax.device_get(initialised(None)[0])


@pytest.mark.parametrize("pool, scan", [("cls", False), ("map", False), ("mean", True)])
def test_every_parameter_is_matched_by_a_rule(pool, scan):
    model = make_model(pool, scan, -10.0)
    abstract = jax.eval_shape(functools.partial(initialise, model=model), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    rules = dict(LOGICAL_RULES)
    unnamed = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_box):
        name = jax.tree_util.keystr(path)
        if not is_box(leaf):
            unnamed[name] = leaf.shape
            continue
        assert len(leaf.names) == len(leaf.value.shape), name
        assert all(n is None or n in rules for n in leaf.names), name
        # Only the shared space and the axes of the one probe may be without a name.
        whole = [n for n, size in zip(leaf.names, leaf.value.shape, strict=True) if n is None and size > 1]
        assert not whole or "projection" in name, (name, leaf.names)
    assert unnamed == {"['log_scale']": (), "['logit_bias']": ()}


def test_parameters_are_born_sharded_and_equal_to_those_of_one_device():
    params, shardings = initialised((2, 2, 2))
    up = params["image"]["stack"]["block_0"]["mlp"]["up"]["kernel"]
    assert up.shape == (32, 128) and up.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert {s.data.shape for s in up.addressable_shards} == {(16, 64)}
    table = params["text"]["token_embed"]
    assert {s.data.shape for s in table.addressable_shards} == {(32, 16)}
    assert params["log_scale"].sharding.is_fully_replicated
    for leaf, sharding, expected in zip(*map(jax.tree.leaves, (params, shardings, start())), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", MESHES)
def test_the_batch_is_split_over_data_and_fsdp(shape):
    mesh = make_mesh(MeshConfig(shape))
    batch = to_global(HOST_BATCH, mesh)
    shards = shape[0] * shape[1]
    for key, value in batch.items():
        assert value.sharding.spec == PartitionSpec(BATCH_AXES)
        np.testing.assert_array_equal(value, HOST_BATCH[key])
        assert {s.data.shape[0] for s in value.addressable_shards} == {BATCH // shards}
        # Contiguous rows in the order of the devices, so that a host's rows are its devices' rows.
        starts = [s.index[0].start or 0 for s in value.addressable_shards]
        assert sorted(set(starts)) == [i * BATCH // shards for i in range(shards)]


def test_a_batch_that_does_not_split():
    with pytest.raises(ValueError):
        to_global({"x": np.zeros((12, 2))}, make_mesh(MeshConfig((8, 1, 1))))


def test_one_axis_takes_what_is_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig((1, -1, 2))).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert jnp.asarray(make_mesh().device_ids.ravel()).tolist() == list(range(8))
