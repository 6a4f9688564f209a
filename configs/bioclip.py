"""BioCLIP: a hierarchy of names, of which each step shows one of five types of text, drawn evenly.

    bvl train configs/bioclip.py:tiny workdir=runs/bioclip_tiny
    bvl train configs/bioclip.py data.root=my_organisms workdir=runs/bioclip

`:tiny` shows the same on phantoms, whose hierarchy is modality > view > findings, in a few minutes on two CPU cores.
Without it the records of data.root need an image and the strings `common` ("black-billed magpie"), `scientific`
("Pica hudsonia") and `taxonomy` ("Animalia Chordata Aves Passeriformes Corvidae Pica hudsonia"); a record without one
of them has the types that are left. A tenth is held out; retrieval is measured by each of the three names.

Source: Stevens et al. 2023, arXiv:2311.18803. The five types, drawn evenly, the prompt and the size of the towers
(CLIP's ViT-B/16) are the paper's; batch, rate and epochs are as we remember them, not checked.
Differs: both towers start from random weights, not from OpenAI's; the byte-pair vocabulary is learned from the
run's own texts; equal texts of a batch are each other's positives; the steps are 100 epochs of 10 M images, to be
lowered to fit your data.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import FINDING_PROMPTS, MODALITY_PROMPTS, Phantoms
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

NAMES = (
    "a photo of {common}",
    "a photo of {scientific}",
    "a photo of {taxonomy}",
    "a photo of {scientific} with common name {common}",
    "a photo of {taxonomy} with common name {common}",
)
# Phantoms have no names in two languages; their levels take the place of names.
LEVELS = (
    "a photo of {labels}",
    "a photo of {modality}",
    "a photo of {modality} {view}",
    "a photo of {modality} with {labels}",
    "a photo of {modality} {view} with {labels}",
)
PHANTOMS = Phantoms(num_patients=3000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)
VIT = dict(pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu")

PAPER = SimpleNamespace(
    image=ViTConfig("B/16", **VIT),
    text=TextConfig(width=512, depth=12, num_heads=8, activation="quick_gelu"),
    embed_dim=512,
    train=Source(text=dict.fromkeys(NAMES, 0.2)),
    image_size=224,
    crop_scale=(0.9, 1.0),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=49408, context_length=77),
    suites={
        f"retrieval_{name}": Retrieval(source=Source(split="val"), text=f"a photo of {{{name}}}")
        for name in ("common", "scientific", "taxonomy")
    },
    steps=30_000,
    batch_size=32768,
    precision="bfloat16",
    lr=1e-4,
    warmup_steps=1000,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=TextConfig(width=96, depth=1, num_heads=3, activation="quick_gelu"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, text=dict.fromkeys(LEVELS, 0.2), cache=True),
    image_size=64,
    crop_scale=(1.0, 1.0),
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=600, context_length=48),
    suites={
        "zeroshot_phantoms/modality": ZeroShot(
            source=HELD_OUT,
            by="modality",
            prompts={name: (f"a photo of {name}",) for name in MODALITY_PROMPTS},
        ),
        "zeroshot_phantoms/findings": ZeroShot(
            source=HELD_OUT,
            prompts={name: (f"a photo of {name}",) for name in FINDING_PROMPTS},
            multi_label=True,
        ),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, text=LEVELS[-1], max_images=300),
    },
    steps=800,
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
        model=DualEncoderConfig(image=size.image, text=size.text, embed_dim=size.embed_dim),
        tasks={"contrastive": Contrastive(targets="same_text")},
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
            options={"b2": 0.98, "eps": 1e-6},
        ),
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
