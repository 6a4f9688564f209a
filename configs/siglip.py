"""SigLIP: every image-text pair of a batch is a yes or no of its own, by a sigmoid with a learned bias.

    bvl train configs/siglip.py:tiny workdir=runs/siglip_tiny
    bvl train configs/siglip.py data.root=my_pairs workdir=runs/siglip

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores. Without it the records of data.root need an
image and a `caption`, and an accelerator is needed; a tenth is held out, and retrieval is measured on it.

Source: Zhai et al. 2023, arXiv:2303.15343, the model B/16 at 224 px. Temperature 0.1, bias -10 and b2 = 0.95 are the
paper's; sizes of the towers are those of the published weights; rate and decay are as we remember them, not checked.
Differs: AdamW, where the authors trained with a variant of Adafactor; a WordPiece vocabulary of the run's own texts
instead of SentencePiece's 32,000 pieces; equal texts of a batch are each other's positives
(tasks.contrastive.targets=diagonal is the paper's); the data are yours, so steps and batch are to be lowered to fit.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import MODALITY_PROMPTS, Phantoms
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

PHANTOMS = Phantoms(num_patients=3000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)
VIT = dict(pool="map", norm_epsilon=1e-6)
TEXT = dict(causal=False, pool="last", attend_padding=True, activation="gelu_tanh", norm_epsilon=1e-6)

PAPER = SimpleNamespace(
    image=ViTConfig("B/16", **VIT),
    text=TextConfig(width=768, depth=12, num_heads=12, **TEXT),
    train=Source(),
    image_size=224,
    tokenizer=TokenizerConfig(vocab_size=32000, context_length=64),
    suites={"retrieval_held_out": Retrieval(source=Source(split="val"))},
    steps=300_000,
    batch_size=32768,
    precision="bfloat16",
    weight_decay=1e-4,
    warmup_steps=20_000,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=TextConfig(width=96, depth=1, num_heads=3, **TEXT),
    train=Source(phantoms=PHANTOMS, text="captions", cache=True),
    image_size=64,
    tokenizer=TokenizerConfig(vocab_size=1000, context_length=28),
    suites={
        "zeroshot_phantoms/modality": ZeroShot(source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
    },
    steps=600,
    batch_size=64,
    precision="float32",
    weight_decay=0.05,
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
            embed_dim=size.image.output_width,
            image_projection="none",
            text_projection="linear_bias",
            init_temperature=0.1,
            init_bias=-10.0,
        ),
        tasks={"contrastive": Contrastive(loss_type="sigmoid")},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(image_size=size.image_size, resize="squash"),
            tokenizer=size.tokenizer,
        ),
        optim=OptimConfig(
            lr=1e-3,
            warmup_steps=size.warmup_steps,
            weight_decay=size.weight_decay,
            options={"b2": 0.95},
        ),
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
