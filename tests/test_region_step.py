"""Grounding, detection and mosaics in the training step: their losses over microbatches add up to those of the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import fresh, one_device
from tiny_regions import first_batch
from tiny_run import fast_compilation, tiny_config  # noqa: F401

from bvl.data.regions import Regions
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


def test_losses_of_microbatches_add_up_to_the_batch():
    """By the tasks' counts, with random boxes, dropout, an absent image, and unequal numbers of phrases and objects; the
    gradients follow, as test_step.py has it."""
    program, rng, step = a_program(TASKS), jax.random.key(3), jnp.zeros((), jnp.int32)
    params = fresh(program)
    rows = data()[1] | {"image_valid": np.arange(8) != 3}

    @jax.jit
    def loss(batch, shares):
        batch = program.prepare(batch, rng)
        features, frozen, _ = program.features(params, {}, batch, rng)
        extra = dict.fromkeys(TASKS)
        total, (metrics, _) = program.losses(params, extra, features, frozen, batch, rng, step, shares=shares)
        return total, metrics

    def counts(batch):
        return {name: task.count(program.prepare(batch, rng), program.info) for name, task in TASKS.items()}

    everything = counts(rows)
    total, values = loss(rows, dict.fromkeys(TASKS, 1.0))
    sums, others = [], []
    for part in range(2):
        micro = {key: value[part::2] for key, value in rows.items()}
        shares = {name: count / everything[name] for name, count in counts(micro).items()}
        assert any(abs(share - 0.5) > 0.02 for share in shares.values()), "the halves differ"
        part_total, part_values = loss(micro, shares)
        sums.append(part_total)
        others.append(part_values)
    np.testing.assert_allclose(sum(sums), total, rtol=1e-5)
    for name, metrics in values.items():
        for key, value in metrics.items():
            added = sum(other[name][key] for other in others)
            np.testing.assert_allclose(added, value, rtol=2e-5, err_msg=f"{name}/{key}")
    for task, key in (
        ("grounding", "l1"),
        ("grounding", "taco"),
        ("grounding", "presence"),
        ("detection", "name"),
        ("detection", "iou"),
    ):
        total, count = values[task][key]
        assert np.isfinite(total) and count > 0, key


def test_tasks_that_need_the_whole_batch():
    """Phrases are contrasted over all of it, and mosaics are made of it."""
    assert Grounding(taco=1.0).per_example and Detection().per_example
    assert not Grounding(contrast=1.0).per_example and not Mosaic().per_example
