"""CLIP: a ViT and a causal text transformer, trained by the softmax over all pairs of a batch in both directions.

    bvl train configs/clip.py:tiny workdir=runs/clip_tiny
    bvl train configs/clip.py data.root=my_pairs workdir=runs/clip

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores. Without it the records of data.root need an
image and a `caption`, and an accelerator is needed; a tenth is held out, and retrieval is measured on it.

Source: Radford et al. 2021, arXiv:2103.00020, the model ViT-B/32. Sizes of the towers and the temperature are those
of the published weights; batch, steps, rate, decay and warm-up are as we remember the paper, not checked.
Differs: equal texts of a batch are each other's positives (tasks.contrastive.targets=diagonal is the paper's); the
byte-pair vocabulary is learned from the run's own texts; the data are yours and not 400 M pairs of the web, so
batch_size=32768 and the steps (32 epochs of those) are to be lowered to fit.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import MODALITY_PROMPTS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import CLIP_MEAN, CLIP_STD, Augment, Preprocess
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=3000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)
VIT = dict(pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu")

PAPER = SimpleNamespace(
    image=ViTConfig("B/32", **VIT),
    text=TextConfig(width=512, depth=12, num_heads=8, activation="quick_gelu"),
    embed_dim=512,
    train=Source(),
    image_size=224,
    crop_scale=(0.9, 1.0),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=49408, context_length=77),
    suites={"retrieval_held_out": Retrieval(source=Source(split="val"))},
    steps=390_000,
    batch_size=32768,
    precision="bfloat16",
    lr=5e-4,
    warmup_steps=2000,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=TextConfig(width=96, depth=1, num_heads=3, activation="quick_gelu"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, text="captions", cache=True),
    image_size=64,
    crop_scale=(1.0, 1.0),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=1000, context_length=32),
    suites={
        "zeroshot_phantoms/modality": ZeroShot(source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
    },
    steps=600,
    batch_size=64,
    precision="float32",
    lr=1e-3,
    warmup_steps=50,
)


def get_config(arg: str | None = None) -> Config:
    size = TINY if parse_arg(arg, tiny=False).tiny else PAPER
    return Config(
        steps=size.steps,
        batch_size=size.batch_size,
        precision=size.precision,
        model=DualEncoderConfig(
            image=size.image,
            text=size.text,
            embed_dim=size.embed_dim,
            init_temperature=0.07,
            max_scale=100.0,
        ),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(
                image_size=size.image_size,
                mean=CLIP_MEAN,
                std=CLIP_STD,
            ),
            augment=Augment(crop_scale=size.crop_scale),
            tokenizer=size.tokenizer,
        ),
        optim=OptimConfig(
            lr=size.lr,
            warmup_steps=size.warmup_steps,
            weight_decay=0.2,
            clip_norm=None,
            options={"b2": 0.98, "eps": 1e-6},
        ),
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
