"""Contrastive pretraining on phantoms, from nothing to a table of results in a few minutes on two CPU cores.

    bvl train configs/quickstart.py workdir=runs/quickstart

Texts are captions and the impressions of reports. The evaluation is on held-out patients.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig
from bvl.data.phantoms import FINDING_PROMPTS, MODALITY_PROMPTS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=4000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="val", cache=True)


def get_config() -> Config:
    return Config(
        steps=1000,
        batch_size=128,
        model=DualEncoderConfig(
            image=ViTConfig("XXS/8", pool="mean"),
            text=TextConfig(width=96, depth=2, num_heads=3),
            embed_dim=96,
        ),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=(Source(phantoms=PHANTOMS, text="captions", cache=True),),
            preprocess=Preprocess(image_size=64),
            tokenizer=TokenizerConfig(vocab_size=1000, context_length=32),
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=100, weight_decay=0.05),
        eval=EvalConfig(
            suites={
                "zeroshot_phantoms/modality": ZeroShot(
                    source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS
                ),
                "zeroshot_phantoms/findings": ZeroShot(
                    source=HELD_OUT, prompts=FINDING_PROMPTS, multi_label=True
                ),
                "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=500),
            }
        ),
        checkpoint=CheckpointConfig(every=250),
        log=LogConfig(every=50),
    )
