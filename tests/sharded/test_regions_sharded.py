"""One training step of all that describes and finds regions: the same on one device and on eight."""

import dataclasses
import functools

import numpy as np
import pytest
from test_step import LARGE, SGD, assert_close, build, named, one_device
from tiny_regions import first_batch
from tiny_run import fast_compilation, tiny_config  # noqa: F401

from bvl.data.regions import KINDS, Regions
from bvl.mesh import MeshConfig, make_mesh, to_global
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import build_model
from bvl.tasks.base import ModelInfo
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.mosaic import Mosaic
from bvl.tasks.region_caption import RegionCaption
from bvl.train.step import Program

pytestmark = pytest.mark.usefixtures("fast_compilation")

TASKS = {
    "grounding": Grounding(contrast=0.1, taco=0.1),
    "detection": Detection(),
    "region_caption": RegionCaption(),
    "contrastive": Contrastive(),
    "mosaic": Mosaic(grids=(2,)),
}
TOWER = {"width": 32, "depth": 1, "num_heads": 2}


@functools.cache
def a_config():
    config = tiny_config(tasks=TASKS)
    model = DualEncoderConfig(
        image=ViTConfig("XXS/16", pool="mean", **TOWER),
        text=TextConfig(**TOWER),
        decoder=DecoderConfig(**TOWER),
        region_encoder=RegionEncoderConfig(width=32, output_size=2, num_heads=2),
        region_decoder=RegionDecoderConfig(pixel_width=8, **TOWER),
        embed_dim=16,
    )
    regions = Regions(kinds=dict.fromkeys(KINDS, 1.0), max_objects=2, max_phrases=3, max_regions=2)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, regions=regions))


@functools.cache
def data():
    tokenizer, batch = first_batch(a_config())
    # Rows, and with them devices, that differ in what they have.
    return tokenizer, batch | {"image_valid": np.arange(len(batch["row"])) != 3}


def one_step(mesh):
    """(gradients, metrics) by name."""
    config, (tokenizer, batch) = a_config(), data()
    program = Program(
        model=build_model(config, tokenizer), preprocess=config.data.preprocess, tasks=TASKS,
        info=ModelInfo(32, 32, 16, (), vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids),
        mesh=mesh, seed=0, ema_decay=0.0, frozen={},
    )  # fmt: skip
    state, step, _ = build(program, optim=dataclasses.replace(SGD, lr=LARGE))
    before = named(state.params)
    state, metrics = step(state, {}, to_global(batch, mesh))
    return {name: (before[name] - x) / LARGE for name, x in named(state.params).items()}, named(metrics)


def test_a_step_on_eight_devices():
    """Losses, counts and gradients, with random boxes, dropped regions, mosaics of fewer rows than devices."""
    gradients, metrics = one_step(one_device())
    sharded_gradients, sharded_metrics = one_step(make_mesh(MeshConfig((8, 1, 1))))
    for name in ("grounding/l1", "grounding/taco", "grounding/presence", "detection/name", "detection/iou"):
        assert metrics[f"tasks/{name}"][1] > 0, name
    for name, value in metrics.items():
        assert np.isfinite(value).all(), name
        np.testing.assert_allclose(sharded_metrics[name], value, rtol=1e-5, err_msg=name)
    assert all(np.isfinite(x).all() for x in gradients.values())
    # More than one sum's rounding: most gradients add up terms of five tasks that cancel in part.
    assert_close(sharded_gradients, gradients, 1e-4)
