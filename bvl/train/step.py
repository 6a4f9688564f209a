"""The training step: gradients of the program's loss, at once or in microbatches, then the update."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bvl.errors import ConfigError
from bvl.mesh import AXES, BATCH_AXES, batch_sharding, num_batch_shards, on_mesh, replicated
from bvl.tasks.base import Features, Task
from bvl.train.optim import Optimizer
from bvl.train.parameters import STATISTICS, group_of, map_by_name, merge, parameter_name
from bvl.train.program import Program, TrainState
from bvl.train.survive import STOP

logger = logging.getLogger(__name__)


def check_accumulation(accumulate: int, tasks: dict[str, Task], batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError unless a batch can be split into `accumulate` microbatches; say which tasks keep much at once."""
    if accumulate == 1:
        return
    _check_split(accumulate, batch_size, mesh)
    for name, task in tasks.items():
        views = () if task.per_example else task.views()
        large = sorted({need for view in views for need in view.need} - {"embed", "pooled"})
        if large:
            logger.warning(
                "optim.accumulate=%d: task %r (%s) compares rows by more than a vector each: %s of all %d rows are kept "
                "at once, and what its loss computes from them is not split",
                accumulate, name, type(task).__name__, ", ".join(large), batch_size,
            )  # fmt: skip


def _check_split(accumulate: int, batch_size: int, mesh: Mesh) -> None:
    parts = accumulate * num_batch_shards(mesh)
    if batch_size % parts:
        raise ConfigError(
            f"batch_size={batch_size} cannot be split into optim.accumulate={accumulate} microbatches over "
            f"{num_batch_shards(mesh)} batch shard(s); use a multiple of {parts}"
        )


def make_train_step(
    program: Program, optimizer: Optimizer, state_shardings: Any
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The compiled step(state, frozen_params, batch) -> (state, metrics); the state's memory is reused.

    Metrics are arrays [total, count]: {"tasks": {task: {name: ...}}, "step": {"loss", "grad_norm"}}, where "step" has
    also "grad_norm/<group>", "update_norm/<group>" and "param_norm/<group>" with `program.group_norms`; all norms are
    of the trained parameters. The random key is a function of (seed, step). With `program.guard` there is also its
    report, "guard", and for a batch with requests to stop the largest, "stop".
    """
    mesh, accumulate = program.mesh, optimizer.config.accumulate

    @on_mesh(mesh)
    def step(state: TrainState, frozen_params: dict[str, Any], batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.key(program.seed), state.step)
        requests = {STOP: _largest(batch[STOP], mesh)} if STOP in batch else {}
        batch = program.prepare({name: x for name, x in batch.items() if name != STOP}, rng)
        trained, frozen = optimizer.split(state.params)
        # With respect to the trained parameters alone: for the others no backward pass exists.
        whole = functools.partial(merge, frozen)

        if accumulate == 1:

            def loss(trained: Any):
                return program.loss(
                    whole(trained),
                    state.extra,
                    frozen_params,
                    batch,
                    rng,
                    state.step,
                    trains=optimizer.trains,
                )

            (total, (metrics, extra, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        else:
            _check_split(accumulate, len(batch["row"]), mesh)
            (total, (metrics, extra, statistics)), grads = _accumulated(
                program, whole, trained, state, frozen_params, batch, rng, optimizer.trains, accumulate
            )
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, trained, value=total)
        trained = optax.apply_updates(trained, updates)
        params = map_by_name(
            lambda name, x: statistics.get(name.removeprefix("model/"), x), merge(trained, frozen)
        )
        plain = program.merge(params)
        extra = {name: task.after_update(extra[name], plain) for name, task in program.tasks.items()}
        ema = state.ema
        if optimizer.averages:
            ema = optimizer.eval_params(opt_state, params)
        elif program.ema_decay:
            t = state.step.astype(jnp.float32)
            decay = jnp.minimum(program.ema_decay, (1.0 + t) / (10.0 + t))
            moves = lambda name: optimizer.trains(name) or STATISTICS.search(name)  # noqa: E731
            ema = map_by_name(lambda n, e, p: decay * e + (1.0 - decay) * p if moves(n) else e, ema, params)
        values = {"loss": total, "grad_norm": optax.tree.norm(grads)}
        if program.group_norms:
            values |= _norms_by_group(grad=grads, update=updates, param=trained)
        totals = {name: jnp.stack([value, jnp.ones(())]) for name, value in values.items()}
        after = TrainState(state.step + 1, params, opt_state, ema, extra)
        gives = {"tasks": metrics, "step": totals}
        if program.guard is not None:
            after, gives = program.guard.apply(state, after, gives, total, values["grad_norm"])
        return after, gives | requests

    return jax.jit(
        step,
        in_shardings=(state_shardings, None, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _largest(requests: jax.Array, mesh: Mesh) -> jax.Array:
    """Over all devices: where a tensor axis goes over hosts, these hold the same rows and may differ in them."""
    return jax.shard_map(
        lambda x: jax.lax.pmax(x.max(), AXES),
        mesh=mesh,
        in_specs=PartitionSpec(BATCH_AXES),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(requests)


def _accumulated(
    program: Program,
    whole: Callable[[Any], Any],
    trained: Any,
    state: TrainState,
    frozen_params: dict[str, Any],
    batch: dict[str, jax.Array],
    rng: jax.Array,
    trains: Callable[[str], bool],
    count: int,
) -> tuple[Any, Any]:
    """((loss, aux), gradient) of the whole batch, as `Program.loss` has them, of which `count` microbatches are encoded
    one after the other.

    whole: trained parameters -> all parameters.
    Tasks that need all rows at once have two passes (GradCache: Gao et al. 2021, arXiv:2101.06983; BASIC: Pham et al.
    2021, arXiv:2111.10050). With theta the parameters, f_m(theta) the features of microbatch m and L the loss,

        first   f = (f_1, ..., f_count), without gradient; then dL/df and dL/dtheta of L(f, theta) at fixed f
        second  dL/dtheta + sum_m (df_m/dtheta)^T dL/df_m, where f_m is computed again, with the same masks

    Tasks with `per_example` take part in the second pass alone: their losses are weighted by their `count` of each
    microbatch, so that the sum is the whole batch's mean, and their extra state goes from one microbatch to the next.
    Batch norms see a microbatch at a time; their new statistics are the mean over microbatches (the variance between
    the microbatches' means is left out).
    """
    tasks = {
        each: [name for name, task in program.tasks.items() if task.per_example == each]
        for each in (True, False)
    }
    split = _Split(program, batch, count)

    def encode(trained: Any, micro: dict[str, jax.Array], names: Collection[str] | None) -> Any:
        return program.features(whole(trained), frozen_params, micro, rng, trains=trains, tasks=names)

    def losses(trained: Any, names: Collection[str], extra: Any, *args: Any, **part: Any) -> Any:
        return program.losses(
            whole(trained), extra, *args, rng, state.step, trains=trains, tasks=names, **part
        )

    # First pass.
    kept, cotangents = {}, {}
    total, metrics, extra = jnp.zeros(()), {}, {}
    grads = jax.tree.map(jnp.zeros_like, trained)
    if tasks[False]:
        _, stacked = jax.lax.scan(
            lambda _, micro: (None, encode(trained, micro, tasks[False])[:2]), None, split.batch
        )
        kept, frozen = split.join(stacked[0]), {name: split.join(found) for name, found in stacked[1].items()}

        def loss(trained: Any, values: Any) -> Any:
            return losses(trained, tasks[False], state.extra, _with_floats(kept, values), frozen, batch)

        (total, (metrics, extra)), (grads, cotangents) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(trained, {name: _floats(features) for name, features in kept.items()})

    # Second pass.
    counts = lambda batch: {name: program.tasks[name].count(batch, program.info) for name in tasks[True]}  # noqa: E731
    all_counts = counts(batch)

    def one(carry: Any, xs: Any) -> Any:
        (grads, extra), (part, micro, cotangents) = carry, xs
        shares = {name: value / jnp.maximum(all_counts[name], 1e-6) for name, value in counts(micro).items()}

        def forward(trained: Any) -> Any:
            features, frozen, statistics = encode(trained, micro, None)
            loss, (metrics, new_extra) = losses(
                trained, tasks[True], extra, features, frozen, micro, shares=shares, part=part
            )
            values = {name: _floats(_only_fields(features[name], kept[name])) for name in kept}
            return (loss, values), (metrics, new_extra, statistics)

        (loss, _), pull, (metrics, extra, statistics) = jax.vjp(forward, trained, has_aux=True)
        (more,) = pull((jnp.ones_like(loss), cotangents))
        return (jax.tree.map(jnp.add, grads, more), extra), (loss, metrics, statistics)

    start = (grads, {name: state.extra[name] for name in tasks[True]})
    (grads, more_extra), (more_losses, more_metrics, statistics) = jax.lax.scan(
        one, start, (jnp.arange(count), split.batch, split.split(cotangents))
    )
    total += more_losses.sum()
    metrics |= jax.tree.map(lambda x: x.sum(0), more_metrics)
    statistics = jax.tree.map(lambda x: x.mean(0), statistics)
    return (total, (metrics, extra | more_extra, statistics)), grads


class _Split:
    """Microbatches of a batch, and their features put together again.

    Microbatch m has the rows m, m + count, ..., so that each device keeps the rows that it has. What a task needing all
    rows has made in another number than the batch's rows is split alike if it is encoded (its last rows are filled up
    with repeated ones, whose features are thrown away), and stays out of microbatches otherwise.
    """

    def __init__(self, program: Program, batch: dict[str, jax.Array], count: int):
        self._mesh, self._count = program.mesh, count
        rows = len(batch["row"])
        inputs = {name for views in program.views().values() for name in views}
        inputs |= {f"{name}_mask" for name in inputs}
        # Of every input: how many there are.
        self._sizes = {name: len(x) for name, x in batch.items() if len(x) == rows or name in inputs}
        self.batch = {name: self._strided(self._filled(batch[name])) for name in self._sizes}

    def join(self, features: dict[str, Features]) -> dict[str, Features]:
        """Features of all microbatches, stacked -> of the whole batch."""

        def joined(name: str, x: jax.Array) -> jax.Array:
            # An input may have several texts, or images, of a row each.
            x = rearrange(x, "n (b k) ... -> (b n k) ...", b=self.batch[name].shape[1])
            each = len(x) // (self._count * self.batch[name].shape[1])
            x = jax.lax.with_sharding_constraint(x, batch_sharding(self._mesh))
            return x[: self._sizes[name] * each]

        return {
            name: jax.tree.map(functools.partial(joined, name), found) for name, found in features.items()
        }

    def split(self, cotangents: dict[str, list[jax.Array]]) -> dict[str, list[jax.Array]]:
        """Cotangents of the whole batch's features -> of every microbatch's, stacked."""

        def split(name: str, x: jax.Array) -> jax.Array:
            each = len(x) // self._sizes[name]
            rows = self._count * self.batch[name].shape[1]
            x = jnp.pad(x, [(0, rows * each - len(x)), *[(0, 0)] * (x.ndim - 1)])
            return self._strided(x, each)

        return {name: [split(name, x) for x in values] for name, values in cotangents.items()}

    def _filled(self, x: jax.Array) -> jax.Array:
        parts = self._count * num_batch_shards(self._mesh)
        size = -(-len(x) // parts) * parts
        return x if size == len(x) else x[jnp.arange(size) % len(x)]

    def _strided(self, x: jax.Array, each: int = 1) -> jax.Array:
        sharding = NamedSharding(self._mesh, PartitionSpec(None, BATCH_AXES))
        x = rearrange(x, "(b n k) ... -> n (b k) ...", n=self._count, k=each)
        return jax.lax.with_sharding_constraint(x, sharding)


def _only_fields(features: Features, like: Features) -> Features:
    """`features` with the fields alone that `like` has."""
    absent = [field.name for field in dataclasses.fields(like) if getattr(like, field.name) is None]
    return features.replace(**dict.fromkeys(absent))


def _floats(tree: Any) -> list[jax.Array]:
    """The leaves that have a gradient, which masks have not."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _with_floats(features: dict[str, Features], values: dict[str, list[jax.Array]]) -> dict[str, Features]:
    """`features` with these in the place of `_floats`."""

    def one(found: Features, values: list[jax.Array]) -> Features:
        rest = iter(values)
        return jax.tree.map(lambda x: next(rest) if jnp.issubdtype(x.dtype, jnp.inexact) else x, found)

    return {name: one(found, values[name]) for name, found in features.items()}


def _norms_by_group(**trees: Any) -> dict[str, jax.Array]:
    """ "<tree>_norm/<group>" -> Euclidean norm, in float32."""
    squares: dict[str, jax.Array] = {}
    for kind, tree in trees.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{kind}_norm/{group_of(parameter_name(path))}"
            squares[name] = squares.get(name, 0.0) + jnp.square(x.astype(jnp.float32)).sum()
    return {name: jnp.sqrt(square) for name, square in squares.items()}
