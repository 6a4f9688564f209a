"""Your boxes and masks: a folder with records.jsonl whose records have `boxes`, and a `mask` where you have one.

    bvl train configs/own_regions.py data.root=my_boxes workdir=runs/regions

One model then describes a region, finds a phrase, segments it and detects objects by name:

    bvl describe runs/regions scan.png --box 0.2,0.3,0.4,0.5
    bvl ground runs/regions scan.png "left lung" --out overlay.png
    bvl detect runs/regions scan.png nodule effusion --out objects.png

A record: {"image": "scan.png", "boxes": [{"box": [0.1, 0.2, 0.3, 0.4], "name": "nodule", "texts": ["..."]}], "mask":
"ids.png"}; boxes are fractions of the image, "texts" further phrases that name the box, the mask's id k is boxes[k - 1].
Where every object is boxed, say so, so that other names count as absent: data.train.0.boxes_complete=true; else give
records "labels_known". Where left and right do not matter: data.train.0.laterality=false
data.augment.flip_horizontal=true. Regions are described by data.regions.text (default: the name).
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.controls import Controls
from bvl.data.pipeline import DataConfig
from bvl.data.regions import Regions
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.describing import RegionDescriptions
from bvl.evals.detection import ObjectDetection
from bvl.evals.grounding import PhraseGrounding
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption
from bvl.train.optim import OptimConfig


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, size=192, image="XS/16", width=128)
    held_out = Source(split="val")
    heads = knobs.width // 32
    return Config(
        steps=1000,
        batch_size=16,
        model=DualEncoderConfig(
            # A convolutional stem learns from few images, and its fine maps show small things.
            image=ViTConfig(knobs.image, stem="conv", pool="mean"),
            text=TextConfig(width=knobs.width, depth=1, num_heads=heads, causal=False, pool="mean"),
            decoder=DecoderConfig(width=knobs.width, depth=2, num_heads=heads),
            region_encoder=RegionEncoderConfig(width=knobs.width, levels=(0, 1)),
            region_decoder=RegionDecoderConfig(width=knobs.width, num_heads=heads),
            embed_dim=knobs.width,
        ),
        tasks={
            "region_caption": RegionCaption(),
            "grounding": Grounding(),
            "detection": Detection(),
        },
        data=DataConfig(
            train=(Source(),),
            preprocess=Preprocess(image_size=knobs.size, resize="pad"),
            augment=Augment(crop_scale=(0.5, 1.0), brightness=0.2, contrast=0.2),
            tokenizer=TokenizerConfig(vocab_size=4000, context_length=24),
            controls=Controls(lengths=20),
            regions=Regions(
                max_objects=32,
                balanced=True,
                kinds={"box": 0.4, "point": 0.3, "mask": 0.3},
                box_jitter=0.1,
            ),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, ema_decay=0.99),
        eval=EvalConfig(
            suites={
                "regions_held_out/box": RegionDescriptions(source=held_out, jitter=0.1),
                "regions_held_out/grounding": PhraseGrounding(source=held_out),
                "regions_held_out/detection": ObjectDetection(source=held_out),
            }
        ),
        checkpoint=CheckpointConfig(every=250),
        log=LogConfig(every=25),
    )
