"""The training step: gradients of the program's loss, at once or in microbatches, then the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bvl.errors import ConfigError
from bvl.mesh import BATCH_AXES, batch_sharding, num_batch_shards, replicated
from bvl.tasks.base import Task
from bvl.train.optim import Optimizer
from bvl.train.parameters import STATISTICS, group_of, map_by_name, merge, parameter_name
from bvl.train.program import Program, TrainState
from bvl.train.survive import STOP


def check_accumulation(accumulate: int, tasks: dict[str, Task], batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError unless a batch can be split into `accumulate` microbatches without changing the loss."""
    if accumulate == 1:
        return
    for name, task in tasks.items():
        if not task.per_example:
            raise ConfigError(
                f"optim.accumulate={accumulate}: task {name!r} ({type(task).__name__}) needs all rows of the batch "
                "at once; set optim.accumulate=1, and to save memory for example model.image.remat=full"
            )
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

    def step(state: TrainState, frozen_params: dict[str, Any], batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.key(program.seed), state.step)
        requests = {STOP: batch[STOP].max()} if STOP in batch else {}
        batch = program.prepare({name: x for name, x in batch.items() if name != STOP}, rng)
        check_accumulation(accumulate, program.tasks, len(batch["row"]), mesh)
        trained, frozen = optimizer.split(state.params)

        def loss(trained: Any, extra: Any, batch: Any, **part: Any):
            return program.loss(
                merge(trained, frozen),
                extra,
                frozen_params,
                batch,
                rng,
                state.step,
                trains=optimizer.trains,
                **part,
            )

        # With respect to the trained parameters alone: for the others no backward pass exists.
        gradient = jax.value_and_grad(loss, has_aux=True)
        if accumulate == 1:
            (total, (metrics, extra, statistics)), grads = gradient(trained, state.extra, batch)
        else:
            (total, (metrics, extra, statistics)), grads = _accumulated(
                program, gradient, trained, state.extra, batch, accumulate
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


def _accumulated(
    program: Program,
    gradient: Callable[..., Any],
    trained: Any,
    extra: dict[str, Any],
    batch: dict[str, jax.Array],
    count: int,
) -> tuple[Any, Any]:
    """What `gradient` gives for the whole batch, from `count` microbatches one after the other.

    A task's losses are weighted by its `count` of each microbatch, so that the sum is the whole batch's mean. Extra
    state goes from one microbatch to the next. Batch norms see a microbatch at a time; their new statistics are the
    mean over microbatches (the variance between the microbatches' means is left out).
    """
    sharding = NamedSharding(program.mesh, PartitionSpec(None, BATCH_AXES))

    def strided(x: jax.Array) -> jax.Array:
        # Rows i, i + count, ...: each device keeps the rows that it has.
        return jax.lax.with_sharding_constraint(rearrange(x, "(b n) ... -> n b ...", n=count), sharding)

    def counts(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: task.count(batch, program.info) for name, task in program.tasks.items()}

    whole = counts(batch)

    def one(carry: Any, xs: Any) -> Any:
        (grads, extra), (part, micro) = carry, xs
        shares = {name: value / jnp.maximum(whole[name], 1e-6) for name, value in counts(micro).items()}
        (loss, (metrics, extra, statistics)), more = gradient(trained, extra, micro, shares=shares, part=part)
        return (jax.tree.map(jnp.add, grads, more), extra), (loss, metrics, statistics)

    start = (jax.tree.map(jnp.zeros_like, trained), extra)
    (grads, extra), (losses, metrics, statistics) = jax.lax.scan(
        one, start, (jnp.arange(count), jax.tree.map(strided, batch))
    )
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    statistics = jax.tree.map(lambda x: x.mean(0), statistics)
    return (losses.sum(), (metrics, extra, statistics)), grads


def _norms_by_group(**trees: Any) -> dict[str, jax.Array]:
    """ "<tree>_norm/<group>" -> Euclidean norm, in float32."""
    squares: dict[str, jax.Array] = {}
    for kind, tree in trees.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{kind}_norm/{group_of(parameter_name(path))}"
            squares[name] = squares.get(name, 0.0) + jnp.square(x.astype(jnp.float32)).sum()
    return {name: jnp.sqrt(square) for name, square in squares.items()}
