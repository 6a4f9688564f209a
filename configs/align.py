"""ALIGN: softmax over pairs with label smoothing, made for many pairs of which some are wrong.

    bvl train configs/align.py:tiny workdir=runs/align_tiny
    bvl train configs/align.py data.root=my_pairs workdir=runs/align

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores. Without it the records of data.root need an
image and a `caption`, and an accelerator is needed; a tenth is held out, and retrieval is measured on it.

Source: Jia et al. 2021, arXiv:2102.05918. Label smoothing 0.1, the learned temperature that starts at 1, BERT-large
read at its first token with one linear map to the width of the image tower, LAMB and the batch are as we remember
the paper, not checked.
Differs: a ResNet-50 (He et al.) stands for EfficientNet-L2, which bvl does not have, so the shared space has 2048
dimensions; images of 288 px instead of crops of 289 px; a vocabulary of 30,000 pieces of the run's own texts instead
of 100,000; equal texts are each other's positives; the data are yours, so steps and batch are to be lowered to fit.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import MODALITY_PROMPTS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.bert import BertConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=3000, image_size=64)
HELD_OUT = Source(phantoms=PHANTOMS, split="test", cache=True)

PAPER = SimpleNamespace(
    image=ResNetConfig("ResNet50"),
    text=BertConfig("large", pool="cls"),
    train=Source(),
    image_size=288,
    crop_scale=(0.7, 1.0),
    tokenizer=TokenizerConfig(vocab_size=30000, context_length=64),
    suites={"retrieval_held_out": Retrieval(source=Source(split="val"))},
    steps=1_200_000,
    batch_size=16384,
    precision="bfloat16",
    optim=OptimConfig(name="lamb", lr=1e-3, schedule="linear", warmup_steps=10_000, weight_decay=1e-5),
)
TINY = SimpleNamespace(
    image=ResNetConfig("ResNet18", width=16, stages=(1, 1, 1, 1)),
    text=BertConfig("tiny", depth=1, pool="cls"),
    train=Source(phantoms=PHANTOMS, text="captions", cache=True),
    image_size=64,
    crop_scale=(1.0, 1.0),
    tokenizer=TokenizerConfig(vocab_size=1000, context_length=28),
    suites={
        "zeroshot_phantoms/modality": ZeroShot(source=HELD_OUT, by="modality", prompts=MODALITY_PROMPTS),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
    },
    steps=600,
    batch_size=64,
    precision="float32",
    # LAMB is made for large batches.
    optim=OptimConfig(lr=1e-3, schedule="linear", warmup_steps=50),
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
            init_temperature=1.0,
        ),
        tasks={"contrastive": Contrastive(label_smoothing=0.1)},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(image_size=size.image_size),
            augment=Augment(crop_scale=size.crop_scale),
            tokenizer=size.tokenizer,
        ),
        optim=size.optim,
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
