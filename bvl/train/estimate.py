"""What one device holds and computes in a training step, from shapes and shardings alone: nothing is allocated.

Parameters, optimiser state and averages are exact. Activations are what JAX's own differentiation keeps between the
forward and the backward pass, so that remat policies, scanned stacks and losses that recompute their blocks count as
they are; XLA keeps fewer where it fuses, and needs working memory beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from bvl.config import Config
from bvl.mesh import AXES, make_mesh, shardings_of, unbox
from bvl.train.abstract import AbstractData, abstract_batch, abstract_program
from bvl.train.flops import count_flops
from bvl.train.optim import Optimizer, make_optimizer
from bvl.train.parameters import merge
from bvl.train.program import Program, TrainState
from bvl.train.step import make_train_step

TOWERS = ("image", "text", "decoder")
# Two numbers of rows tell what grows with the rows from what does not.
FEW_ROWS, MORE_ROWS = 16, 32


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass: `fixed`, such as kernels cast to bfloat16, and of each row `whole` bytes that
    the tensor axis does not split and `split` ones that it does."""

    fixed: int
    whole: float
    split: float

    def on_device(self, rows: float, shape: tuple[int, int, int]) -> float:
        _, fsdp, tensor = shape
        return self.fixed / (fsdp * tensor) + rows * (self.whole + self.split / tensor)


@dataclasses.dataclass(frozen=True)
class Model:
    """A config's program on one device, and its state as boxed shapes."""

    config: Config
    data: AbstractData
    program: Program
    optimizer: Optimizer
    state: TrainState

    @classmethod
    def of(cls, config: Config, data: AbstractData) -> Model:
        program = abstract_program(config, data, make_mesh(devices=jax.local_devices()[:1]))
        params = jax.eval_shape(lambda: program.init_params(jax.random.key(0)))
        optimizer = make_optimizer(config.optim, config.steps, unbox(params))
        state = jax.eval_shape(lambda: program.init_state(jax.random.key(0), optimizer))
        return cls(config, data, program, optimizer, state)

    def with_config(self, config: Config) -> Model:
        """The same model for a config that differs in batch size, accumulation or mesh alone."""
        changed = dataclasses.replace(self, config=config)
        changed.__dict__["kept"] = self.kept
        return changed

    @functools.cached_property
    def trained(self) -> Any:
        """The boxed shapes of the parameters that get gradients."""
        return self.optimizer.split(self.state.params)[0]

    @functools.cached_property
    def frozen_params(self) -> dict[str, Any]:
        return dict.fromkeys(self.program.frozen, unbox(self.state.params["model"]))

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations of one step over all devices; the same however it is split."""
        batch = abstract_batch(self.config, self.data, self.config.batch_size)
        shardings = shardings_of(self.state, self.program.mesh)
        step = make_train_step(self.program, self.optimizer, shardings)
        return count_flops(step.trace(unbox(self.state), self.frozen_params, batch).jaxpr)

    @functools.cached_property
    def kept(self) -> Kept:
        """What is kept for the backward pass, beside parameters and batch."""
        few, more = (self._kept_of(rows) for rows in (FEW_ROWS, MORE_ROWS))
        whole, split = ((b - a) / (MORE_ROWS - FEW_ROWS) for a, b in zip(few, more, strict=True))
        return Kept(max(round(sum(few) - FEW_ROWS * (whole + split)), 0), whole, split)

    def _kept_of(self, rows: int) -> tuple[int, int]:
        program, optimizer = self.program, self.optimizer

        def forward(state: TrainState, frozen_params: Any, batch: dict[str, jax.Array]) -> list[jax.Array]:
            rng = jax.random.key(0)
            prepared = program.prepare(batch, rng)
            trained, frozen = optimizer.split(state.params)

            def loss(trained: Any):
                params = merge(trained, frozen)
                return program.loss(
                    params, state.extra, frozen_params, prepared, rng, state.step, trains=optimizer.trains
                )

            _, backward, _ = jax.vjp(loss, trained, has_aux=True)
            given = {id(x) for x in jax.tree.leaves((state, frozen_params, batch))}
            leaves = {id(x): x for x in jax.tree.leaves(backward) if isinstance(x, jax.Array)}
            return [x for i, x in leaves.items() if i not in given]

        batch = abstract_batch(self.config, self.data, rows)
        kept = jax.eval_shape(forward, unbox(self.state), self.frozen_params, batch)
        sizes = _tensor_sizes(self.config.model)
        split = [x for x in kept if sizes.intersection(x.shape[1:])]
        return bytes_of(kept) - bytes_of(split), bytes_of(split)


def _tensor_sizes(model: Any) -> set[int]:
    """Sizes of the axes that tensor parallelism splits: heads, and the hidden layer of each MLP."""
    towers = [getattr(model, name) for name in TOWERS]
    return {size for tower in towers if hasattr(tower, "sizes") for size in tower.sizes[2:4]}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes, boxed or not."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(unbox(tree)))


def bytes_on_device(boxed: Any, shape: tuple[int, int, int]) -> int:
    """Bytes that one device of a mesh of this shape holds of a tree of boxed shapes."""
    shardings = shardings_of(boxed, AbstractMesh(shape, AXES))
    pairs = zip(jax.tree.leaves(unbox(boxed)), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
