"""The one blocked loop over all pairs of a global batch, with a ring over the batch axes of a mesh.

Losses that compare every row with every column (contrastive, and whatever comes later) say what one block
of pairs does; this file decides which block is where and when. Every device keeps its rows; the columns,
with what has been summed for them so far, go round the ring and are home again after one full turn:

    turn 0:  device d sees its own columns, chunk by chunk
    turn 1:  device d sees the columns of device d - 1, ...

so that no device holds more than [its rows, chunk_size] pairs. In groups, the ring closes within each group of
devices, after fewer turns. The loop itself is not meant to be
differentiated (that would save every block): a loss wraps it in `jax.custom_vjp` and runs a second loop,
which recomputes the blocks, for the backward pass. The `custom_vjp` stands outside of the `shard_map` here,
so that no cotangent ever crosses the border of a `shard_map`, where replicated ones can be scaled wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from bvl.errors import ConfigError
from bvl.mesh import BATCH_AXES, num_batch_shards

RowState = TypeVar("RowState")
ColState = TypeVar("ColState")

# Pairs in one block by default: 2^21 are 8 MiB of f32 logits. Narrower blocks than 128 columns starve matmuls.
_BLOCK_PAIRS = 2**21
_MIN_CHUNK = 128


def default_chunk_size(num_rows: int) -> int:
    """Columns of a block of about 2^21 pairs for `num_rows` rows on a device, and at least 128."""
    return max(_BLOCK_PAIRS // max(num_rows, 1), _MIN_CHUNK)


def blocked_loop(
    block: Callable[[PyTree, PyTree, RowState, ColState, PyTree], tuple[RowState, ColState]],
    *,
    rows: PyTree,
    cols: PyTree,
    row_state: RowState,
    col_state: ColState,
    shared: PyTree = (),
    mesh: Mesh | None = None,
    chunk_size: int | None = None,
    groups: int = 1,
) -> tuple[RowState, ColState]:
    """Apply `block` once to every block of rows x columns and return what it has accumulated for both.

    `rows` and `row_state` are pytrees of arrays with leading axis n, `cols` and `col_state` with leading
    axis m, `shared` is any pytree that all blocks see. `block(rows, cols, row_state, col_state, shared)`
    gets the r rows of a device and a chunk of c <= chunk_size columns, with their states, and returns both
    new states. Blocks come in no order to rely on. `chunk_size` need not divide anything: what is left over
    is one narrower block.

    groups: rows and columns are cut into as many equal runs, and a run of rows meets only the columns of its own.
    They are runs of the global arrays, so that the result is the same for any number of devices.

    With a mesh the leading axes are split over `BATCH_AXES`, and so are the results. Raises ConfigError if
    they cannot be split evenly, over devices or groups, or if chunk_size < 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size={chunk_size}: give at least 1, or None for the default")
    shards = 1 if mesh is None else num_batch_shards(mesh)
    sizes = (("rows", _length(rows)), ("columns", _length(cols)))
    check_groups(groups, shards, dict(sizes))
    # Groups that share a device, and devices that share a group; one of both is 1.
    on_device, devices = max(groups // shards, 1), max(shards // groups, 1)

    def at_hand(rows, cols, row_state, col_state, shared):
        """All pairs of the same group on this device."""
        if on_device == 1:
            return _all_chunks(block, rows, cols, row_state, col_state, shared, chunk_size)

        def one(parts):
            return _all_chunks(block, *parts, shared, chunk_size)

        def split(x):
            return x.reshape(on_device, -1, *x.shape[1:])

        states = jax.lax.map(one, jax.tree.map(split, (rows, cols, row_state, col_state)))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)

    if shards == 1:
        return at_hand(rows, cols, row_state, col_state, shared)
    for name, size in sizes:
        if size % shards:
            raise ConfigError(
                f"{size} {name} cannot be split over {shards} batch shards (mesh data x fsdp); "
                f"use a batch size that is a multiple of {shards}"
            )

    def ring(rows, cols, row_state, col_state, shared):
        if devices == 1:
            return at_hand(rows, cols, row_state, col_state, shared)

        def turn(_, carry):
            cols, row_state, col_state = carry
            # The columns do not wait for the block: their transfer can overlap with the computation.
            next_cols = _to_next_device(cols, shards, devices)
            row_state, col_state = at_hand(rows, cols, row_state, col_state, shared)
            return next_cols, row_state, _to_next_device(col_state, shards, devices)

        _, row_state, col_state = jax.lax.fori_loop(0, devices, turn, (cols, row_state, col_state))
        return row_state, col_state

    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    mapped = jax.shard_map(
        ring, mesh=mesh, in_specs=(split, split, split, split, whole), out_specs=(split, split)
    )
    return mapped(rows, cols, row_state, col_state, shared)


def check_groups(groups: int, shards: int, sizes: dict[str, int]) -> None:
    """Raise ConfigError unless the devices and the rows can be put into `groups` equal groups.

    sizes: what there is of rows -> how many.
    """
    if groups == 1:
        return
    if groups < 1 or (shards % groups and groups % shards):
        divisors = [d for d in range(1, shards + 1) if shards % d == 0]
        raise ConfigError(
            f"groups={groups} does not fit {shards} batch shard(s) (mesh data x fsdp): each group takes as many, or each "
            f"shard holds as many groups; use one of {divisors}, or a multiple of {shards}"
        )
    for name, size in sizes.items():
        if size % groups:
            raise ConfigError(f"{size} {name} cannot be split into groups={groups} of equal size")


def _length(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _to_next_device(tree: PyTree, shards: int, ring: int) -> PyTree:
    """From each device to the next one of its ring; `ring` devices in a row make one."""
    permutation = [(device, device // ring * ring + (device + 1) % ring) for device in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, permutation), tree)


def _all_chunks(block, rows, cols, row_state, col_state, shared, chunk_size):
    """All columns at hand, `chunk_size` at a time; states are updated in place, not stacked."""
    num_cols = _length(cols)
    chunk_size = min(chunk_size or default_chunk_size(_length(rows)), max(num_cols, 1))

    def one(start, size, row_state, col_state):
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        def put(x, new):
            return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=0)

        row_state, new = block(
            rows, jax.tree.map(take, cols), row_state, jax.tree.map(take, col_state), shared
        )
        return row_state, jax.tree.map(put, col_state, new)

    full, rest = divmod(num_cols, chunk_size)
    row_state, col_state = jax.lax.fori_loop(
        0, full, lambda i, states: one(i * chunk_size, chunk_size, *states), (row_state, col_state)
    )
    if rest:
        row_state, col_state = one(full * chunk_size, rest, row_state, col_state)
    return row_state, col_state
