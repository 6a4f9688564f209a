"""What one device holds and computes in a training step, from shapes and shardings alone: nothing is allocated.

Parameters, optimiser state and averages are exact. Activations are what JAX's own differentiation keeps between the
forward and the backward pass, so that remat policies, scanned stacks and losses that recompute their blocks count as
they are; XLA keeps fewer where it fuses, and needs working memory beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from bvl.config import Config, with_value
from bvl.losses.caption import CHUNK_LOGITS
from bvl.losses.ring import default_chunk_size
from bvl.mesh import AXES, make_mesh, shardings_of, unbox
from bvl.tasks.contrastive import Contrastive
from bvl.train.abstract import AbstractData, abstract_batch, abstract_program
from bvl.train.flops import count_flops
from bvl.train.optim import Optimizer, make_optimizer
from bvl.train.parameters import merge, named_leaves
from bvl.train.program import Program, TrainState
from bvl.train.step import make_train_step

# Parameters of a transformer's layers, which are gathered for the backward pass too.
LAYER = re.compile(r"/(blocks|block_\d+|layer_\d+)/")
TOWERS = ("image", "text", "decoder")
# What is kept grows with the rows. A number that hardly any model has for its depth.
TRACED_ROWS = 36


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
        """The same model for a config that differs in batch size, accumulation, mesh or chunks of losses alone."""
        changed = dataclasses.replace(self, config=config)
        changed.__dict__.update(kept=self.kept, plain=self.plain)
        return changed

    def computed_as(self, config: Config) -> Model:
        """The same parameters for a config that differs in remat policies or precision alone."""
        return dataclasses.replace(
            self, config=config, program=abstract_program(config, self.data, self.program.mesh)
        )

    @functools.cached_property
    def plain(self) -> Kept:
        """What would be kept if no layer were computed again."""
        config = self.config
        for name, tower in remat_towers(config.model).items():
            if tower.remat != "none":
                config = with_value(config, f"model.{name}.remat", "none")
        return self.kept if config == self.config else self.computed_as(config).kept

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

        batch = abstract_batch(self.config, self.data, TRACED_ROWS)
        kept = jax.eval_shape(forward, unbox(self.state), self.frozen_params, batch)
        # Kernels in another type have their parameter's shape.
        parameters = {x.shape for x in jax.tree.leaves(unbox(self.state.params))}
        fixed = [x for x in kept if x.shape in parameters]
        rest = [x for x in kept if x.shape not in parameters]
        sizes = _tensor_sizes(self.config.model)
        split = bytes_of([x for x in rest if sizes.intersection(x.shape[1:])])
        return Kept(bytes_of(fixed), (bytes_of(rest) - split) / TRACED_ROWS, split / TRACED_ROWS)


def remat_towers(model: Any) -> dict[str, Any]:
    """Name -> options of the towers that are stacks of layers, which may be computed again in the backward pass."""
    return {name: tower for name in TOWERS if hasattr(tower := getattr(model, name), "remat")}


def gathered_again(config: Config, name: str) -> bool:
    """Whether the backward pass gathers a parameter once more. Kernels of layers that stand one after the other and
    are not computed again are gathered once, and stay until the backward pass is done with them."""
    found = LAYER.search(name)
    tower = remat_towers(config.model).get(name.split("/")[1])
    return bool(found) and tower is not None and (found[1] == "blocks" or tower.remat != "none")


def working_bytes(model: Model, shape: tuple[int, int, int], rows: int) -> float:
    """What is needed for a moment: a layer's inside, gathered kernels, the blocks of losses.

    rows: of a device in one microbatch; a contrastive loss is that of all its microbatches together.
    """
    config, (data, fsdp, tensor) = model.config, shape
    layers = sum(tower.sizes[1] for tower in remat_towers(config.model).values())
    inside = model.plain.on_device(rows, shape) / max(layers, 1)
    kernels = 0.0
    if fsdp > 1:
        sizes: dict[str, int] = {}
        stay = 0
        for name, x in named_leaves(unbox(model.state.params)).items():
            found = LAYER.search(name)
            stacked = x.shape[0] if found and found[1] == "blocks" else 1
            layer = name[: found.end()] if found else name
            sizes[layer] = sizes.get(layer, 0) + bytes_of(x) // stacked
            stay += bytes_of(x) if found and not gathered_again(config, name) else 0
        kernels = (stay + 2 * max(sizes.values())) / tensor
    blocks = 0.0
    for task in config.tasks.values():
        if isinstance(task, Contrastive):
            # Groups that share a device follow one another.
            compared = rows * config.optim.accumulate // max(task.groups // (data * fsdp), 1)
            columns = compared * config.data.texts_per_image
            # The logits, their exponentials, targets and gradient.
            blocks += 4 * 4 * compared * min(task.chunk_size or default_chunk_size(compared), columns)
    if config.model.decoder is not None:
        blocks += 3 * 4 * CHUNK_LOGITS
    return inside + kernels + blocks


def transfers(model: Model, shape: tuple[int, int, int]) -> dict[str, float]:
    """Bytes of each kind of transfer in one step, for one device: the larger of what it gives and gets, each time.

    Kernels that fsdp splits are gathered in the forward pass and, as `gathered_again` says, in the backward pass, for each
    microbatch; gradients are summed over the batch shards (written as all-reduce; accelerators scatter what fsdp
    splits). The tensor axis sums activations: two a layer forward, four backward and one more where the layer is computed
    again. The columns of a contrastive loss go round all batch shards once forward and once backward; in groups, round
    those of their group, after each row and column has been sent to its group (and, backward, its gradient back).
    """
    config, (data, fsdp, tensor) = model.config, shape
    accumulate, shards = config.optim.accumulate, data * fsdp
    rows = config.batch_size // (shards * accumulate)
    out = dict.fromkeys(("all-gather", "all-reduce", "collective-permute", "all-to-all"), 0.0)
    leaves = named_leaves(model.state.params, boxed=True)
    shardings = named_leaves(shardings_of(model.state.params, AbstractMesh(shape, AXES)))
    for name, box in leaves.items():
        spec, x = shardings[name].spec, unbox(box)
        size = math.prod(x.shape) * x.dtype.itemsize / (tensor if "tensor" in spec else 1)
        # Read a second time for the logits, forward and backward, with a gradient of its own.
        tied = name == "model/decoder/token_embed" and config.model.decoder.tied_head
        if fsdp > 1 and "fsdp" in spec:
            out["all-gather"] += size * accumulate * (2 if gathered_again(config, name) else 1 + 2 * tied)
        if shards > 1 and model.optimizer.trains(name):
            out["all-reduce"] += size * accumulate * (1 + tied)
    width = jnp.dtype(config.precision).itemsize
    if tensor > 1:
        for tower, tokens in _tokens(model).items():
            options = getattr(config.model, tower)
            dim, depth = options.sizes[:2]
            out["all-reduce"] += (
                (6 + (options.remat == "full")) * depth * rows * tokens * dim * width * accumulate
            )
    if shards > 1:
        images = config.batch_size // shards
        columns = images * config.data.texts_per_image
        for task in config.tasks.values():
            if isinstance(task, Contrastive):
                ring = shards // task.groups
                if ring > 1:
                    # Texts and, backward, their gradient; sums and what else a column carries are 14 numbers.
                    out["collective-permute"] += ring * columns * (3 * config.model.embed_dim + 14) * 4
                if task.groups > 1:
                    # The embedding and its gradient; whether it is there and whose it is.
                    out["all-to-all"] += (images + columns) * (2 * config.model.embed_dim + 2) * 4
    return {kind: size for kind, size in out.items() if size}


def _tokens(model: Model) -> dict[str, int]:
    """Tower of transformer layers -> tokens of a row."""
    config, context = model.config, model.data.tokenizer.context_length
    found = {}
    for tower, options in remat_towers(config.model).items():
        if tower == "image":
            height, width = options.grid(config.data.preprocess.height_width)
            found[tower] = height * width + options.has_class_token + options.registers
        elif tower == "text":
            found[tower] = context * config.data.texts_per_image
        else:
            found[tower] = (context + config.data.controls.num_slots) * config.data.texts_per_image
    return found


def _tensor_sizes(model: Any) -> set[int]:
    """Sizes of the axes that tensor parallelism splits: heads, and the hidden layer of each MLP."""
    return {size for tower in remat_towers(model).values() for size in tower.sizes[2:4]}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree of shapes, boxed or not."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(unbox(tree)))


def bytes_on_device(boxed: Any, shape: tuple[int, int, int]) -> int:
    """Bytes that one device of a mesh of this shape holds of a tree of boxed shapes."""
    shardings = shardings_of(boxed, AbstractMesh(shape, AXES))
    pairs = zip(jax.tree.leaves(unbox(boxed)), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
