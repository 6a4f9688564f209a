"""Grounding, detection and mosaics in the training step: microbatches add up to the batch, and data to steps."""

import dataclasses
import functools

import numpy as np
import pytest
from test_step import LARGE, SGD, assert_close, build, named, one_device
from tiny_regions import first_batch
from tiny_run import fast_compilation, tiny_config  # noqa: F401

from bvl.data.regions import Regions
from bvl.mesh import to_global
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import build_model
from bvl.tasks.base import ModelInfo
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.mosaic import Mosaic
from bvl.train.step import Program

pytestmark = pytest.mark.usefixtures("fast_compilation")

TASKS = {"grounding": Grounding(taco=0.5), "detection": Detection(weight=0.5, masks=True)}


@functools.cache
def a_config():
    config = tiny_config(tasks=TASKS)
    model = DualEncoderConfig(
        image=ViTConfig("XXS/8", stem="conv", pool="map", width=16, depth=1, num_heads=2, dropout=0.2),
        text=TextConfig(width=16, depth=1, num_heads=2, causal=False),
        region_decoder=RegionDecoderConfig(
            width=16, depth=1, num_heads=2, num_queries=2, pixel_width=8, instance_masks=True
        ),
        embed_dim=8,
    )
    data = dataclasses.replace(config.data, regions=Regions(max_objects=3, max_phrases=3, max_regions=2))
    return dataclasses.replace(config, model=model, data=data)


@functools.cache
def data():
    return first_batch(a_config())


def a_program(tasks):
    config, tokenizer = a_config(), data()[0]
    return Program(
        model=build_model(config, tokenizer), preprocess=config.data.preprocess, tasks=tasks,
        info=ModelInfo(16, 16, 8, (), vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids),
        mesh=one_device(), seed=0, ema_decay=0.0, frozen={},
    )  # fmt: skip


def one_step(tasks, accumulate):
    program = a_program(tasks)
    state, step, _ = build(program, optim=dataclasses.replace(SGD, lr=LARGE, accumulate=accumulate))
    before = named(state.params)
    batch = data()[1] | {"image_valid": np.arange(8) != 3}
    state, metrics = step(state, {}, to_global(batch, program.mesh))
    return {name: (before[name] - x) / LARGE for name, x in named(state.params).items()}, named(metrics)


def test_microbatches_add_up_to_the_batch():
    """Values and gradients, with random boxes, dropout, an absent image, and unequal numbers of phrases and objects."""
    whole, values = one_step(TASKS, 1)
    parts, others = one_step(TASKS, 2)
    valid = data()[1]["phrase_valid"]
    assert valid[::2].sum() != valid[1::2].sum() or valid[:4].sum() != valid[4:].sum()
    assert_close(parts, whole, 3e-5)
    for name, value in values.items():
        np.testing.assert_allclose(others[name], value, rtol=2e-5, err_msg=name)
    for name in ("grounding/l1", "grounding/taco", "grounding/presence", "detection/name", "detection/iou"):
        total, count = values[f"tasks/{name}"]
        assert np.isfinite(total) and count > 0, name
    assert all(np.isfinite(x).all() for x in whole.values())


def test_tasks_that_need_the_whole_batch():
    """Phrases are contrasted over all of it, and mosaics are made of it."""
    assert Grounding(taco=1.0).per_example and Detection().per_example
    assert not Grounding(contrast=1.0).per_example and not Mosaic().per_example
