"""Groups of rows that are compared with each other, drawn anew at every step from the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from bvl.errors import ConfigError
from bvl.losses.ring import check_groups
from bvl.mesh import BATCH_AXES, num_batch_shards


def draw_groups(key: Key[Array, ""], num_rows: int, groups: int) -> Int[Array, "u g"]:
    """What `into_groups` needs to know of a random division of `num_rows` rows: permutations tau_u of 0 ... groups - 1.

    Raises ConfigError unless num_rows is a multiple of groups squared.
    """
    if num_rows % groups**2:
        raise ConfigError(
            f"a batch of {num_rows} rows cannot be drawn into groups={groups}: use a multiple of {groups**2} (groups "
            "squared)"
        )
    blocks = jax.random.split(key, num_rows // groups**2)
    return jax.vmap(lambda key: jax.random.permutation(key, groups))(blocks)


def rows_of_groups(order: Int[Array, "u g"]) -> Int[Array, " n"]:
    """The rows of a batch group by group: entry i is the row that `into_groups` puts at place i.

    The batch is a table [a, u, v] of g runs a, of blocks u of g rows v each. Group k takes one row of every block of
    every run, and no row goes to two groups:

        place (k, u, a)  <-  row (a, u, tau_u((k - a) mod g))
    """
    blocks, groups = order.shape
    k, u, a = jnp.meshgrid(jnp.arange(groups), jnp.arange(blocks), jnp.arange(groups), indexing="ij")
    return ((a * blocks + u) * groups + order[u, (k - a) % groups]).reshape(-1)


def into_groups(tree: PyTree, order: Int[Array, "u g"], *, mesh: Mesh | None = None, each: int = 1) -> PyTree:
    """Arrays [n * each, ...] with their rows in the order of `rows_of_groups`, `each` entries in a row moved together.

    It is the same for any number of devices. On a mesh whose batch axes split the rows, each row is sent once, by one
    all-to-all (and its gradient sent back once). Raises ConfigError where the rows cannot be split over groups and
    devices.
    """
    blocks, groups = order.shape
    shards = 1 if mesh is None else num_batch_shards(mesh)
    size = blocks * groups**2
    check_groups(groups, shards, {"rows": size})
    if size % (groups * shards):
        raise ConfigError(
            f"a batch of {size} rows cannot be drawn into groups={groups} on {shards} batch shards (mesh data x fsdp): "
            f"use a multiple of {groups * max(groups, shards)}"
        )
    # `senders` devices hold the same blocks of all runs; `devices` share a run.
    senders = min(groups, shards)
    devices = shards // senders
    exchange = [[sender * devices + j for sender in range(senders)] for j in range(devices)]

    def on_device(order: jax.Array, x: jax.Array) -> jax.Array:
        x = x.reshape(groups // senders, blocks // devices, groups, each, *x.shape[1:])
        device = jax.lax.axis_index(BATCH_AXES)
        runs = device // devices * x.shape[0] + jnp.arange(x.shape[0])
        order = jax.lax.dynamic_slice_in_dim(order, device % devices * x.shape[1], x.shape[1])
        # Of each run and block the row of group 0, of group 1, ...
        chosen = order.T[(jnp.arange(groups) - runs[:, None]) % groups].swapaxes(1, 2)
        x = jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 3)), axis=2)
        x = jax.lax.all_to_all(x, BATCH_AXES, 2, 0, axis_index_groups=exchange, tiled=True)
        return jnp.moveaxis(x, (0, 2), (2, 0)).reshape(-1, *x.shape[4:])

    if shards == 1:
        rows = rows_of_groups(order)
        return jax.tree.map(lambda x: x.reshape(size, each, *x.shape[1:])[rows].reshape(x.shape), tree)
    split = PartitionSpec(BATCH_AXES)
    move = jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
    return jax.tree.map(lambda x: move(order, x), tree)
