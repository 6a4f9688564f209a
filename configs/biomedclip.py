"""BiomedCLIP: figures of articles and their long captions, read by a BERT with a context of 256.

    bvl train configs/biomedclip.py:tiny workdir=runs/biomedclip_tiny
    bvl train configs/biomedclip.py data.root=my_figures workdir=runs/biomedclip

`:tiny` shows the same on phantoms, whose captions and reports are put together into one text, in a few minutes on
two CPU cores. Without it the records of data.root need an image and a `caption`, and an accelerator is needed; a
tenth is held out, and retrieval is measured on it. With PubMedBERT's vocabulary at hand:

    bvl train configs/biomedclip.py:vocab=pubmedbert/vocab.txt data.root=my_figures workdir=runs/biomedclip

Source: Zhang et al. 2023, arXiv:2303.00915. Sizes of the towers, the text projection of two maps, context and
embedding are those of the published weights; batch, rate and number of epochs are as we remember them, not checked.
Differs: both towers start from random weights, not from ImageNet and PubMedBERT; without vocab= a vocabulary of the
same size is learned from the run's own texts; equal captions are each other's positives; the steps are 32 epochs of
15 M pairs, to be lowered to fit your data.
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
from bvl.models.bert import BertConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=3000, image_size=64)
LONG_TEXT = "{caption}. {findings} Impression: {impression}"
HELD_OUT = Source(phantoms=PHANTOMS, split="test", text=LONG_TEXT, cache=True)
VIT = dict(pool="cls", norm_epsilon=1e-6)

PAPER = SimpleNamespace(
    image=ViTConfig("B/16", **VIT),
    text=BertConfig("pubmedbert", pool="cls"),
    embed_dim=512,
    train=Source(),
    image_size=224,
    crop_scale=(0.9, 1.0),
    vocab_size=30522,
    suites={"retrieval_held_out": Retrieval(source=Source(split="val"))},
    steps=119_000,
    batch_size=4096,
    precision="bfloat16",
    lr=5e-4,
    warmup_steps=2000,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=BertConfig("tiny", depth=1, pool="cls"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, text=LONG_TEXT, cache=True),
    image_size=64,
    crop_scale=(1.0, 1.0),
    vocab_size=1000,
    suites={
        "zeroshot_phantoms/modality": ZeroShot(source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
    },
    steps=500,
    batch_size=32,
    precision="float32",
    lr=5e-4,
    warmup_steps=50,
)


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, tiny=False, vocab="")
    size = TINY if knobs.tiny else PAPER
    return Config(
        steps=size.steps,
        batch_size=size.batch_size,
        precision=size.precision,
        model=DualEncoderConfig(
            image=size.image,
            text=size.text,
            embed_dim=size.embed_dim,
            image_projection="linear",
            text_projection="mlp",
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
            tokenizer=TokenizerConfig(
                path=knobs.vocab or None, vocab_size=size.vocab_size, context_length=256
            ),
        ),
        optim=OptimConfig(
            lr=size.lr,
            warmup_steps=size.warmup_steps,
            weight_decay=0.2,
            options={"b2": 0.98, "eps": 1e-6},
        ),
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
