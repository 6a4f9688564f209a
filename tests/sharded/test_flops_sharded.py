"""The same work on eight devices counts the same."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bvl.mesh import MeshConfig, make_mesh
from bvl.train.flops import count_flops


@pytest.mark.parametrize("axes", [("data",), ("data", "fsdp")])
def test_work_inside_shard_map(axes):
    mesh = make_mesh(MeshConfig(shape=(4, 2, 1)))
    a, b = jnp.ones((16, 8)), jnp.ones((8, 32))
    split = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P(axes), P()), out_specs=P(axes), axis_names=set(axes)
    )
    assert count_flops(jax.make_jaxpr(split)(a, b)) == 2 * 16 * 8 * 32
