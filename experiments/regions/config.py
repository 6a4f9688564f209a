"""The joint models of the experiments on regions; `python experiments/regions/run.py` trains them all.

bvl train experiments/regions/config.py:set=phantoms workdir=runs/regions/phantoms
bvl train experiments/regions/config.py:set=bccd data.root=path/to/data workdir=runs/regions/bccd
"""

import dataclasses

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.controls import Controls
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.regions import Regions
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.base import Task
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=5000)
FREE = Augment(crop_scale=(0.4, 1.0), flip_horizontal=True, flip_vertical=True, brightness=0.2, contrast=0.2)
PROMPTS = {"kinds": {"box": 0.5, "point": 0.5}, "box_jitter": 0.2}


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, set="phantoms", seed=0)
    return dataclasses.replace(SETS[knobs.set](), seed=knobs.seed)


def phantoms() -> Config:
    """Contrast, descriptions and phrases of phantoms."""
    return _config(
        Source(phantoms=PHANTOMS, text={"captions": 0.5, "impression": 0.5}, cache=True),
        tasks={"contrastive": Contrastive(), "region_caption": RegionCaption(), "grounding": Grounding()},
        size=(64, 64),
        patch=8,
        mask_stride=2,
        steps=900,
        batch_size=48,
        regions=Regions(
            max_regions=4,
            max_objects=8,
            max_phrases=4,
            text={"texts": 1.0},
            phrases={"name": 0.5, "texts": 0.5},
            kinds={"box": 0.4, "point": 0.3, "mask": 0.3},
            box_jitter=0.1,
            mask_stride=2,
        ),
        context=28,
    )


def covid_cxr() -> Config:
    """The lungs of chest X-rays."""
    return _config(
        Source(name="covid_cxr", subfolder="covid_cxr", cache=True),
        tasks={"region_caption": RegionCaption(), "grounding": Grounding(bce=0, dice=0)},
        size=(128, 128),
        patch=16,
        mask_stride=8,
        steps=600,
        batch_size=16,
        augment=Augment(crop_scale=(0.6, 1.0), brightness=0.2, contrast=0.2),
        regions=Regions(max_regions=2, max_objects=2, max_phrases=2, mask_stride=8, **PROMPTS),
    )


def bccd() -> Config:
    """The cells of blood smears."""
    return _config(
        Source(name="bccd", subfolder="bccd", laterality=False, cache=True, boxes_complete=True),
        tasks={"region_caption": RegionCaption(), "detection": Detection()},
        size=(192, 256),
        patch=16,
        mask_stride=4,
        steps=600,
        batch_size=16,
        augment=dataclasses.replace(FREE, crop_scale=(0.5, 1.0)),
        regions=Regions(
            max_regions=6, balanced=True, max_objects=32, max_phrases=3, mask_stride=4, **PROMPTS
        ),
    )


def dsb2018_nuclei() -> Config:
    """The nuclei of cells."""
    return _config(
        Source(name="dsb2018_nuclei", subfolder="dsb2018_nuclei", laterality=False, cache=True),
        tasks={"grounding": Grounding(l1=0, giou=0, score=0)},
        size=(128, 128),
        patch=16,
        mask_stride=2,
        steps=600,
        batch_size=16,
        augment=FREE,
        regions=Regions(max_objects=16, max_phrases=1, mask_stride=2),
    )


SETS = {f.__name__: f for f in (phantoms, covid_cxr, bccd, dsb2018_nuclei)}


def _config(
    source: Source,
    *,
    tasks: dict[str, Task],
    size: tuple[int, int],
    patch: int,
    mask_stride: int,
    steps: int,
    batch_size: int,
    regions: Regions,
    augment: Augment | None = None,
    context: int = 8,
) -> Config:
    describes = "region_caption" in tasks
    return Config(
        steps=steps,
        batch_size=batch_size,
        model=DualEncoderConfig(
            image=ViTConfig(f"XS/{patch}", stem="conv", depth=2, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean"),
            decoder=DecoderConfig(width=96, depth=2, num_heads=3) if describes else None,
            region_encoder=RegionEncoderConfig(width=96, levels=(0, 1)) if describes else None,
            region_decoder=RegionDecoderConfig(width=96, depth=2, mask_stride=mask_stride, pixel_width=32),
            embed_dim=96,
        ),
        tasks=tasks,
        data=DataConfig(
            train=(source,),
            preprocess=Preprocess(image_size=size, resize="squash"),
            augment=augment or Augment(),
            tokenizer=TokenizerConfig(vocab_size=1000, context_length=context),
            controls=Controls(lengths=20) if describes else Controls(),
            regions=regions,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30),
        eval=EvalConfig(suites={}),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=20, tensorboard=False),
    )
