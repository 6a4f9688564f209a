"""Contrast, captions and regions on phantoms in one run, from nothing to a table in minutes on two CPU cores.

    bvl train configs/quickstart.py workdir=runs/quickstart

Texts are captions and the impressions of reports; the captioner can be asked for a number of words. Boxes, points and
masks are described, and phrases are found and segmented, or said not to be there. The evaluation is on held-out patients.
Then, for example:

    bvl caption runs/quickstart IMAGES --guidance 2 --length 12
    bvl describe runs/quickstart IMAGE --box 0.2,0.3,0.4,0.5 --length 7
    bvl ground runs/quickstart IMAGE nodule cyst --out overlay.png
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig
from bvl.data.controls import Controls
from bvl.data.phantoms import FINDING_NOUNS, FINDING_PROMPTS, MODALITY_PROMPTS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.regions import Regions
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.evals.caption import Captions
from bvl.evals.describing import RegionDescriptions
from bvl.evals.grounding import PhraseGrounding
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=5000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)


def get_config() -> Config:
    return Config(
        steps=900,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig("XS/8", stem="conv", depth=1, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean"),
            decoder=DecoderConfig(width=96, depth=2, num_heads=3),
            region_encoder=RegionEncoderConfig(width=96, levels=(0, 1)),
            region_decoder=RegionDecoderConfig(width=96, depth=1, mask_stride=4, pixel_width=32),
            embed_dim=128,
        ),
        tasks={
            "contrastive": Contrastive(),
            "caption": Caption(),
            "region_caption": RegionCaption(),
            "grounding": Grounding(),
        },
        data=DataConfig(
            train=(Source(phantoms=PHANTOMS, text={"captions": 0.5, "impression": 0.5}, cache=True),),
            preprocess=Preprocess(image_size=64),
            tokenizer=TokenizerConfig(vocab_size=1000, context_length=28),
            controls=Controls(lengths=20),
            regions=Regions(
                max_regions=1,
                max_objects=8,
                max_phrases=2,
                text="texts",
                kinds={"box": 0.4, "point": 0.3, "mask": 0.3},
                mask_stride=4,
                context_length=12,
            ),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=50),
        eval=EvalConfig(
            suites={
                "zeroshot_phantoms/modality": ZeroShot(
                    source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS
                ),
                "zeroshot_phantoms/findings": ZeroShot(
                    source=HELD_OUT, prompts=FINDING_PROMPTS, multi_label=True
                ),
                "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=500),
                "caption_phantoms": Captions(source=HELD_OUT, lexicon="phantoms"),
                "regions_phantoms/box": RegionDescriptions(
                    source=HELD_OUT,
                    length=7,
                    name_words=FINDING_NOUNS,
                    word_groups={"side": ("left", "right")},
                    max_images=300,
                ),
                "regions_phantoms/grounding": PhraseGrounding(source=HELD_OUT, max_images=300),
            }
        ),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=50),
    )
