"""The compiled step of a ViT-L/14 and a text tower of 12 layers, with fully sharded parameters on 8 devices.

Nothing is allocated: the program is lowered for shapes, and its optimised HLO read.
"""

import dataclasses
import functools
import math

import jax

from bvl.config import Config
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.mesh import MeshConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.abstract import abstract_data
from bvl.train.collectives import Program as Hlo
from bvl.train.estimate import Model, bytes_on_device, transfers
from bvl.train.optim import OptimConfig
from bvl.train.parameters import named_leaves
from bvl.train.plan import compiled_lines, compiled_step

ROWS, CONTEXT, VOCABULARY, EMBED = 8192, 77, 49408, 768
VIT_L = dict(pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu")


def a_config(image, text, embed, batch_size, image_size):
    return Config(
        steps=100,
        batch_size=batch_size,
        model=DualEncoderConfig(image=image, text=text, embed_dim=embed),
        tasks={"contrastive": Contrastive(targets="diagonal")},
        data=DataConfig(
            train=(Source(),),
            preprocess=Preprocess(image_size=image_size),
            tokenizer=TokenizerConfig(vocab_size=VOCABULARY, context_length=CONTEXT),
        ),
        optim=OptimConfig(warmup_steps=10),
        mesh=MeshConfig((1, 8, 1)),
    )


@dataclasses.dataclass
class Compiled:
    model: Model
    step: jax.stages.Compiled
    hlo: Hlo

    def collectives(self, kind):
        return [c for c in self.hlo.collectives() if c.kind == kind]

    @property
    def state(self):
        """Shapes with their shardings, as the program takes them."""
        (state, _, _), _ = self.step.args_info
        shardings = self.step.input_shardings[0][0]
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def compile_step(config):
    data = abstract_data(config)
    step = compiled_step(config, data, 8)
    return Compiled(Model.of(config, data), step, Hlo(step.as_text()))


@functools.cache
def vit_l():
    options = dict(scan=True, remat="full")
    text = TextConfig(width=768, depth=12, num_heads=12, **options)
    return compile_step(a_config(ViTConfig("L/14", **VIT_L, **options), text, EMBED, ROWS, 224))


def bytes_of(shape):
    return 4 * math.prod(shape)


def matrices_of_a_layer(width, hidden):
    """Bytes of what fsdp splits of a layer: four maps of attention, two of the MLP, the biases of those to the width."""
    return bytes_of((4, width, width)) + bytes_of((2, width, hidden)) + bytes_of((2, width))


def vectors_of_a_layer(width, hidden):
    """Bytes of the rest: scale and bias of two norms, biases of queries, keys, values and of the hidden layer."""
    return bytes_of((7, width)) + bytes_of((hidden,))


def test_no_stack_is_gathered_and_two_layers_at_most_at_once():
    compiled = vit_l()
    stacks = {
        x.shape
        for name, x in named_leaves(compiled.state.params).items()
        if "/blocks/" in name and not x.sharding.is_fully_replicated
    }
    assert (24, 1024, 4096) in stacks and (12, 768, 768) in stacks
    # Stacks of norms, which are whole on every device, have the shape of stacks of biases.
    assert not {s for s in stacks if len(s) > 2} & {array.shape for array in compiled.hlo.arrays()}
    gathers = compiled.collectives("all-gather")
    assert not stacks & {array.shape for gather in gathers for array in gather.types}
    outside = sorted(gather.bytes for gather in gathers if not gather.loop)
    # Beside the token table nothing outside of the layers is larger than a projection.
    assert outside[-1] == bytes_of((VOCABULARY, 768)) and outside[-2] <= bytes_of((1024, EMBED))
    # There are four loops over layers: forward and backward of two towers, with six matrices a layer each.
    loops = {gather.loop for gather in gathers if gather.loop}
    assert len(loops) == 4 and all(gather.times in (12, 24) for gather in gathers if gather.loop)
    assert sum(gather.bytes > bytes_of((768, 512)) for gather in gathers if gather.loop) == 4 * 6
    peaks = compiled.hlo.gathered_at_once()
    one = {
        loop: max(g.bytes for g in gathers if g.loop == loop) * 3 for loop in loops
    }  # 4 d^2 + 2 d 4d = 3 d 4d
    for loop in loops:
        assert one[loop] / 4 <= peaks[loop] <= 2 * one[loop]


def test_no_logits_of_all_pairs():
    shapes = {array.shape for array in vit_l().hlo.arrays()}
    local = ROWS // 8
    assert any(shape[-2:] == (local, local) for shape in shapes), "the block of logits that a device holds"
    for a, b in ((ROWS, ROWS), (local, ROWS), (ROWS, local)):
        assert not [shape for shape in shapes if shape[-2:] == (a, b)]


def test_transfers_are_those_of_fully_sharded_training():
    """Kinds and bytes a step, for one device; XLA on CPU has no reduce-scatter and writes all-reduce and slice."""
    towers = ((24, 1024, 4096), (12, 768, 3072))
    gathered = sum(depth * matrices_of_a_layer(*sizes) for depth, *sizes in towers)
    vectors = sum(depth * vectors_of_a_layer(*sizes) for depth, *sizes in towers)
    # Patch embedding, two tables of positions, two projections, the token table.
    others = bytes_of((588 + 257, 1024)) + bytes_of((CONTEXT + 1024 + 768 + VOCABULARY, 768))
    local = ROWS // 8
    expected = {
        # Forward, and backward, where the layer that is computed again shares the kernels with its gradient.
        "all-gather": 2 * gathered + others,
        "all-reduce": gathered + vectors + others,
        # The texts of a device go round once in the forward and in the backward pass, there with their gradient.
        "collective-permute": 8 * (3 * bytes_of((local, EMBED)) + 14 * bytes_of((local,))),
    }
    measured = vit_l().hlo.bytes_by_kind()
    assert measured.keys() == expected.keys()
    for kind, size in expected.items():
        assert abs(measured[kind] - size) <= 0.1 * size, (kind, measured[kind], size)
    assert abs(sum(measured.values()) - sum(expected.values())) <= 0.1 * sum(expected.values())
    # What `bvl plan` says of the same config.
    planned = transfers(vit_l().model, (1, 8, 1))
    assert planned.keys() == measured.keys()
    for kind, size in planned.items():
        assert abs(measured[kind] - size) <= 0.1 * size, (kind, measured[kind], size)


def test_the_plan_has_what_the_compiler_says():
    lines = compiled_lines(vit_l().step)
    assert [line.split()[2] for line in lines[:2]] == ["arguments", "temporaries"]
    assert {line.split()[2] for line in lines[2:]} == {"all-gather", "all-reduce", "collective-permute"}
    arguments = float(lines[0].split()[3])
    # Parameters, two moments and a device's rows.
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(vit_l().state)
    )
    assert held / 1e9 < arguments < 1.3 * held / 1e9


def test_parameters_and_optimiser_are_split_over_all_devices():
    state = vit_l().state
    leaves = jax.tree.leaves((state.params, state.opt_state))
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert total / 8 <= device <= 1.05 * total / 8
    planned = vit_l().model.state
    assert (
        bytes_on_device(planned.params, (1, 8, 1)) + bytes_on_device(planned.opt_state, (1, 8, 1)) == device
    )
