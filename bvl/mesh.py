"""The device mesh, the rules that place parameters on it, and the way from host rows to global arrays.

Order of work: shapes first (`jax.eval_shape`), shardings second, arrays last, so that nothing is ever
created unsharded (the order big_vision's `train.py` shows).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bvl.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# A batch is split over both: fully sharded parameters are gathered layer by layer, rows are not.
BATCH_AXES = ("data", "fsdp")

# Logical name of a parameter axis -> mesh axis. Names without a rule are an error, not a default.
LOGICAL_RULES: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("position", None),
    ("patch", None),
    ("norm", None),
    ("classes", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along the axes (data, fsdp, tensor); one of them may be -1, "all that are left".

    hosts: how many processes must have been started; None = any number.
    """

    shape: tuple[int, int, int] = (-1, 1, 1)
    hosts: int | None = None

    def __post_init__(self):
        if self.hosts is not None and self.hosts < 1:
            raise ConfigError(f"mesh.hosts={self.hosts}: must be at least 1, or null")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """The sizes of the axes on so many devices; raises ConfigError when they do not use each exactly once."""
    shape = list(config.shape)
    if len(shape) != len(AXES) or sum(s == -1 for s in shape) > 1 or any(s < 1 and s != -1 for s in shape):
        raise ConfigError(
            f"mesh.shape={config.shape}: give {len(AXES)} sizes for {AXES}, at most one of them -1"
        )
    if -1 in shape:
        known = math.prod(s for s in shape if s != -1)
        shape[shape.index(-1)] = max(num_devices // known, 1)
    if math.prod(shape) != num_devices:
        divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
        raise ConfigError(
            f"mesh.shape={tuple(config.shape)} needs {math.prod(shape)} devices, there are {num_devices}; "
            f"sizes must be divisors of it: {divisors}"
        )
    return tuple(shape)


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """Build the mesh; raises ConfigError when the shape does not use every device exactly once."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_hosts(config: MeshConfig, num_hosts: int) -> None:
    """Raise ConfigError unless as many processes were started as the config asks for."""
    if config.hosts not in (None, num_hosts):
        raise ConfigError(
            f"mesh.hosts={config.hosts}, but {num_hosts} process(es) take part in this run: start "
            f"{config.hosts} (bvl launch --hosts {config.hosts}), or set mesh.hosts={num_hosts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the batch axes, all else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def rows_on_devices(batch_size: int, mesh: Mesh) -> int:
    """The least number of rows from batch_size on of which every batch shard gets as many."""
    shards = num_batch_shards(mesh)
    return -(-batch_size // shards) * shards


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError unless the global batch splits evenly over the batch shards."""
    count = num_batch_shards(mesh)
    if batch_size % count:
        below = batch_size // count * count
        near = [b for b in (below, below + count) if b > 0]
        raise ConfigError(
            f"batch_size={batch_size} cannot be split over {count} batch shards (mesh.shape data x fsdp); use "
            f"{' or '.join(map(str, near))}"
        )


def share_of_host(mesh: Mesh, host: int) -> tuple[int, int]:
    """(i, n): of n equal parts of a batch's rows, in their order, the devices of a host hold the i-th.

    Hosts have a part in common where the tensor axis goes over several. Raises ConfigError where a host's rows are
    not one such part.
    """
    shards = mesh.devices.reshape(num_batch_shards(mesh), -1)
    mine = [i for i, devices in enumerate(shards) if any(d.process_index == host for d in devices)]
    first, size = mine[0], len(mine)
    if mine != list(range(first, first + size)) or first % size or len(shards) % size:
        raise ConfigError(
            f"mesh.shape={tuple(mesh.shape.values())}: the devices of host {host} hold the batch shards {mine} of "
            f"{len(shards)}, which are not one equal part; use sizes that divide the devices of a host, or are multiples"
        )
    return first // size, len(shards) // size


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, path: str) -> PartitionSpec:
    rules = dict(LOGICAL_RULES)
    axes: list[str | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ConfigError(
                f"parameter {path}: no rule for the logical axis {name!r} in bvl/mesh.py LOGICAL_RULES"
            )
        axis = rules[name] if name is not None else None
        if axis is not None and axis in taken:
            raise ConfigError(
                f"parameter {path}: its logical axes {taken[axis]!r} and {name!r} both lie on the mesh axis {axis!r} by "
                "bvl/mesh.py LOGICAL_RULES; give one of them another rule, or no name"
            )
        if axis is not None:
            taken[axis] = name
        # A dimension that does not divide stays whole.
        axes.append(None if axis is not None and size % mesh.shape[axis] else axis)
    return PartitionSpec(*axes)


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of shapes in which Linen boxes carry logical axis names.

    Leaves without a box (scalars, optimiser counters) are replicated.
    """

    def one(path, leaf):
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, _spec(leaf.names, leaf.value.shape, mesh, jax.tree_util.keystr(path)))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, and in what is traced there, `constrain_rows` knows the mesh; also a decorator."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def constrain_rows(x: jax.Array) -> jax.Array:
    """`x` with its leading axis over the batch axes of the mesh that the program runs `on_mesh`; without one, `x` itself.

    For what goes in and out of layers. The partitioner, which sees rows and a kernel's inputs both split over fsdp, else
    gathers the rows of all devices at each layer and leaves the kernels where they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Within a shard_map a device has its rows already.
    if mesh.empty or mesh.manual_axes or x.shape[0] % num_batch_shards(mesh):
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *rest))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> tuple[Any, Any]:
    """Run `init(*args)` so that every array is born with its sharding; returns (unboxed tree, shardings)."""
    shardings = shardings_of(jax.eval_shape(init, *args), mesh)
    tree = jax.jit(lambda *a: unbox(init(*a)), out_shardings=shardings)(*args)
    return tree, shardings


def unbox(tree: Any) -> Any:
    """The tree without the Linen boxes that carry logical axis names."""
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows that every host holds in full -> a global array split over the batch axes."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every host holds in full -> the same with these shardings: a tree of them, or one for all."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        on_this_host = not isinstance(x, jax.Array) or x.is_fully_addressable
        if sharding.is_fully_addressable or not on_this_host:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def whole(array: Any) -> np.ndarray:
    """All values of an array, also where other hosts hold parts of it; every host must ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's contiguous rows of every batch key -> global arrays split over the batch axes."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
