"""The models of the experiments on regions; `python experiments/regions/run.py` trains and judges them all.

    bvl train experiments/regions/config.py:set=phantoms workdir=runs/regions/phantoms
    bvl train experiments/regions/config.py:set=bccd data.root=path/to/data workdir=runs/regions/bccd

One joint model a data set: phantoms, covid_cxr, bccd, dsb2018_nuclei. "contrast" and "mosaic" learn phantoms from pairs
alone, without and with mosaics; "pretrain" is the contrastive model that bccd may start from (init_from).
"""

import dataclasses

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.controls import Controls
from bvl.data.phantoms import FINDING_NOUNS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.regions import Regions
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError
from bvl.evals.base import Suite
from bvl.evals.describing import RegionDescriptions
from bvl.evals.detection import ObjectDetection
from bvl.evals.grounding import PhraseGrounding
from bvl.evals.heat_maps import HeatMapPointing
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
from bvl.tasks.mosaic import Mosaic
from bvl.tasks.region_caption import RegionCaption
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=5000)
PHANTOM_TEXTS = {"captions": 0.5, "impression": 0.5}
# Asked for where the side is to be named: "large dense nodule in the left lung".
FULL_LENGTH = 7
JITTERED = {"kinds": {"box": 0.5, "point": 0.5}, "box_jitter": 0.2}
FLIPS = {"flip_horizontal": True, "flip_vertical": True}


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, set="phantoms", split="", seed=0)
    if knobs.set not in SETS:
        raise ConfigError(f"set={knobs.set!r}: choose one of {', '.join(SETS)}")
    return dataclasses.replace(SETS[knobs.set](knobs.split), seed=knobs.seed)


def phantoms(split: str) -> Config:
    """Contrast, descriptions and phrases of phantoms, in one model."""
    held_out = Source(phantoms=PHANTOMS, split=split or "test", cache=True)
    told = {"source": held_out, "length": FULL_LENGTH, "name_words": FINDING_NOUNS, "max_images": 400}
    sides = {**told, "word_groups": {"side": ("left", "right")}}
    return _config(
        Source(phantoms=PHANTOMS, text=PHANTOM_TEXTS, cache=True),
        tasks={
            "contrastive": Contrastive(),
            "region_caption": RegionCaption(),
            "grounding": Grounding(bce=4, dice=4),
        },
        size=(64, 64),
        patch=8,
        mask_stride=2,
        steps=800,
        # With 32 the findings are learned in this time, and the sides are not.
        batch_size=48,
        regions=Regions(
            max_regions=4,
            max_objects=8,
            max_phrases=3,
            text="texts",
            phrases={"name": 0.7, "texts": 0.3},
            kinds={"box": 0.4, "point": 0.3, "mask": 0.3},
            box_jitter=0.1,
            mask_stride=2,
            context_length=12,
        ),
        context=28,
        suites={
            "regions_phantoms/box": RegionDescriptions(**sides),
            "regions_phantoms/box_mirrored": RegionDescriptions(**sides, mirrored=True),
            "regions_phantoms/point": RegionDescriptions(**told, kind="point"),
            "regions_phantoms/mask": RegionDescriptions(**told, kind="mask"),
            "regions_phantoms/length": RegionDescriptions(**{**told, "length": "reference"}),
            "regions_phantoms/grounding": PhraseGrounding(source=held_out, phrases="name"),
        },
    )


def covid_cxr(split: str) -> Config:
    """The lungs of chest X-rays."""
    source = Source(name="covid_cxr", subfolder="covid_cxr", cache=True)
    held_out = dataclasses.replace(source, split=split or "val")
    return _config(
        source,
        tasks={
            "region_caption": RegionCaption(weight=0.3),
            "grounding": Grounding(bce=0, dice=0, positives=8),
        },
        size=(128, 128),
        patch=16,
        mask_stride=8,
        steps=800,
        batch_size=16,
        augment=Augment(crop_scale=(0.6, 1.0), brightness=0.2, contrast=0.2),
        regions=Regions(max_regions=2, max_objects=2, max_phrases=2, mask_stride=8, **JITTERED),
        suites={
            "regions_covid_cxr/grounding": PhraseGrounding(source=held_out, baseline=source, by="phrase"),
            "regions_covid_cxr/box": RegionDescriptions(source=held_out, jitter=0.2),
        },
    )


def bccd(split: str) -> Config:
    """The cells of blood smears."""
    source = Source(name="bccd", subfolder="bccd", laterality=False, cache=True, boxes_complete=True)
    held_out = dataclasses.replace(source, split=split or "val")
    return _config(
        source,
        tasks={"region_caption": RegionCaption(), "detection": Detection()},
        size=(192, 256),
        patch=16,
        mask_stride=4,
        steps=600,
        batch_size=16,
        augment=Augment(crop_scale=(0.5, 1.0), brightness=0.2, contrast=0.2, **FLIPS),
        regions=Regions(
            max_regions=6, balanced=True, max_objects=32, max_phrases=3, mask_stride=4, **JITTERED
        ),
        suites={
            "regions_bccd/detection": ObjectDetection(source=held_out),
            "regions_bccd/box": RegionDescriptions(source=held_out, jitter=0.2),
            "regions_bccd/point": RegionDescriptions(source=held_out, kind="point", jitter=0.2),
        },
    )


def dsb2018_nuclei(split: str) -> Config:
    """The nuclei of cells."""
    source = Source(name="dsb2018_nuclei", subfolder="dsb2018_nuclei", laterality=False, cache=True)
    held_out = dataclasses.replace(source, split=split or "val")
    return _config(
        source,
        tasks={"grounding": Grounding(l1=0, giou=0, score=0)},
        size=(256, 256),
        patch=16,
        mask_stride=2,
        steps=800,
        batch_size=8,
        augment=Augment(crop_scale=(0.4, 1.0), brightness=0.2, contrast=0.2, **FLIPS),
        regions=Regions(max_objects=1, max_phrases=1, mask_stride=2),
        suites={
            "regions_dsb2018_nuclei/grounding": PhraseGrounding(
                source=held_out, phrases=("nucleus",), by="modality"
            )
        },
    )


def contrast(split: str) -> Config:
    """Pairs of phantoms and texts alone."""
    return _from_pairs(split, {"contrastive": Contrastive()})


def mosaic(split: str) -> Config:
    """The same with mosaics."""
    return _from_pairs(split, {"contrastive": Contrastive(), "mosaic": Mosaic()})


def pretrain(split: str) -> Config:
    """Pairs of phantoms of blood smears, at bccd's patch size."""
    smears = Phantoms(num_patients=3000, image_size=128, modalities=("blood smear",))
    return _config(
        Source(phantoms=smears, text=PHANTOM_TEXTS, laterality=False, cache=True),
        tasks={"contrastive": Contrastive()},
        size=(128, 128),
        patch=16,
        steps=400,
        batch_size=64,
        context=28,
    )


def _from_pairs(split: str, tasks: dict[str, Task]) -> Config:
    held_out = Source(phantoms=PHANTOMS, split=split or "test", cache=True)
    return _config(
        Source(phantoms=PHANTOMS, text=PHANTOM_TEXTS, cache=True),
        tasks=tasks,
        size=(64, 64),
        patch=8,
        steps=600,
        batch_size=64,
        context=28,
        suites={
            "regions_phantoms/heat_maps": HeatMapPointing(source=held_out, phrases="name"),
            "regions_phantoms/denied": HeatMapPointing(
                source=held_out, phrases="name", template="with a {}", against="without a {}"
            ),
        },
    )


def _config(
    source: Source,
    *,
    tasks: dict[str, Task],
    size: tuple[int, int],
    patch: int,
    steps: int,
    batch_size: int,
    mask_stride: int = 4,
    regions: Regions | None = None,
    augment: Augment | None = None,
    context: int = 8,
    suites: dict[str, Suite] | None = None,
) -> Config:
    describes = "region_caption" in tasks
    finds = "grounding" in tasks or "detection" in tasks
    return Config(
        steps=steps,
        batch_size=batch_size,
        model=DualEncoderConfig(
            image=ViTConfig(f"XS/{patch}", stem="conv", depth=2, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean"),
            decoder=DecoderConfig(width=96, depth=2, num_heads=3) if describes else None,
            # The stem's maps, finer than the patches.
            region_encoder=RegionEncoderConfig(width=96, levels=(0, 1)) if describes else None,
            region_decoder=RegionDecoderConfig(width=96, depth=2, mask_stride=mask_stride, pixel_width=32)
            if finds
            else None,
            embed_dim=96,
        ),
        tasks=tasks,
        data=DataConfig(
            train=(source,),
            preprocess=Preprocess(image_size=size, resize="squash"),
            augment=augment or Augment(),
            tokenizer=TokenizerConfig(vocab_size=1000, context_length=context),
            controls=Controls(lengths=20) if describes else Controls(),
            regions=regions or Regions(),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30, ema_decay=0.99),
        eval=EvalConfig(suites=suites or {}),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=20, tensorboard=False),
    )


SETS = {f.__name__: f for f in (phantoms, covid_cxr, bccd, dsb2018_nuclei, contrast, mosaic, pretrain)}
