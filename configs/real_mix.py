"""Textbook figures, chest X-rays with notes and six-class scans in one run: a weighted mixture of real sources.

    bvl train configs/real_mix.py data.root=path/to/data workdir=runs/real_mix

`data.root` is the folder that holds openstax_figures, covid_cxr and mednist_subset. The sets are small: the
numbers, by source and with intervals, show what a model from scratch learns of them, which is little.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.probe import LinearProbe
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

FIGURES = {"caption": 0.5, "alt_text": 0.5}
MEDNIST_VAL = Source(name="mednist", subfolder="mednist_subset", split="val")


def get_config() -> Config:
    return Config(
        steps=300,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig("XS/16", pool="mean"),
            text=TextConfig(width=128, depth=3, num_heads=4),
            embed_dim=128,
        ),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=(
                Source(name="openstax", subfolder="openstax_figures", text=FIGURES, weight=0.5, cache=True),
                Source(name="covid", subfolder="covid_cxr", weight=0.2, cache=True),
                Source(
                    name="mednist", subfolder="mednist_subset", text="class_prompt", weight=0.3, cache=True
                ),
            ),
            preprocess=Preprocess(image_size=112, resize="pad"),
            augment=Augment(crop_scale=(0.6, 1.0), brightness=0.1, contrast=0.1),
            tokenizer=TokenizerConfig(vocab_size=4000, context_length=64),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30, weight_decay=0.1),
        eval=EvalConfig(
            suites={
                "retrieval_openstax": Retrieval(
                    source=Source(name="openstax", subfolder="openstax_figures", split="val", text=FIGURES)
                ),
                "retrieval_covid": Retrieval(source=Source(name="covid", subfolder="covid_cxr", split="val")),
                "zeroshot_mednist": ZeroShot(source=MEDNIST_VAL),
                "probe_mednist": LinearProbe(
                    train=Source(name="mednist", subfolder="mednist_subset"), test=MEDNIST_VAL, max_train=1000
                ),
            }
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=20),
    )
