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

PHANTOMS = Phantoms(num_patients=5000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)


def get_config() -> Config:
    return Config(
        steps=1500,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig("XS/8", stem="conv", depth=1, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean"),
            embed_dim=128,
        ),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=(Source(phantoms=PHANTOMS, text={"captions": 0.5, "impression": 0.5}, cache=True),),
            preprocess=Preprocess(image_size=64),
            tokenizer=TokenizerConfig(vocab_size=1000, context_length=28),
        ),
        optim=OptimConfig(lr=5e-4, warmup_steps=50),
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
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=50),
    )
