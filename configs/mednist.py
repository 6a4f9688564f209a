"""Six classes of small scans, told apart by prompts alone: a smoke test on real images (a few minutes on two cores).

    bvl train configs/mednist.py data.root=path/to/mednist_subset workdir=runs/mednist

The folder holds records.jsonl with a `class_prompt` for every image. 1-NN on 8x8 pixels already gets 0.9955, so
a good number here shows that the machinery works, not that the model is good.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.zeroshot import ZeroShot
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=400,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig("XXS/8", pool="mean"),
            text=TextConfig(width=64, depth=1, num_heads=2),
            embed_dim=64,
        ),
        # Only six texts exist: equal ones are each other's positives.
        tasks={"contrastive": Contrastive(targets="same_text")},
        data=DataConfig(
            train=(Source(name="mednist", text="class_prompt", cache=True),),
            preprocess=Preprocess(image_size=64),
            augment=Augment(crop_scale=(0.7, 1.0), brightness=0.1, contrast=0.1),
            tokenizer=TokenizerConfig(vocab_size=200, context_length=16),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=40),
        eval=EvalConfig(
            suites={"zeroshot_mednist": ZeroShot(source=Source(name="mednist", split="val", cache=True))}
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=20),
    )
