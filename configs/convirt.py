"""ConVIRT: radiographs against one random sentence of their report, the direction from image to text weighing more.

    bvl train configs/convirt.py:tiny workdir=runs/convirt_tiny
    bvl train configs/convirt.py data.root=my_reports workdir=runs/convirt

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores. Without it the records of data.root need an
image and `findings` or `impression` (another field: data.train.0.text=report); a tenth is held out by patient.

Source: Zhang et al. 2020, arXiv:2010.00747. Loss weight 0.75, temperature 0.1 (fixed), 512 dimensions, max-pooled
words and batch 32 are as we remember the paper, not checked.
Differs: both towers start from random weights, not from ImageNet and ClinicalBERT, so no layer of the text tower is
frozen; the projections have a GELU and no biases; images are cropped and changed in brightness and contrast, but
neither rotated nor blurred, and mirrored only where you say that sides do not matter
(data.train.0.laterality=false data.augment.flip_horizontal=true); the rate falls by a cosine instead of at plateaus;
equal sentences of a batch are each other's positives; 200,000 steps are ours.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import FINDING_PROMPTS, FINDINGS, Phantoms
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

PHANTOMS = Phantoms(num_patients=3000, image_size=64, modalities=("chest radiograph",))
HELD_OUT = Source(phantoms=PHANTOMS, split="test", text="findings", cache=True)
REPORT = dict(text={"findings": 0.5, "impression": 0.5}, sentences="one")

PAPER = SimpleNamespace(
    image=ResNetConfig("ResNet50", pool="mean"),
    text=BertConfig("clinicalbert", pool="max"),
    embed_dim=512,
    train=Source(**REPORT),
    image_size=224,
    crop_scale=(0.6, 1.0),
    tokenizer=TokenizerConfig(vocab_size=28996, lowercase=False, context_length=128),
    suites={
        "retrieval_held_out": Retrieval(source=Source(split="val", text={"findings": 0.5, "impression": 0.5}))
    },
    steps=200_000,
    batch_size=32,
    precision="bfloat16",
    lr=1e-4,
    warmup_steps=1000,
)
TINY = SimpleNamespace(
    image=ResNetConfig("ResNet18", width=16, stages=(1, 1, 1, 1), pool="mean"),
    text=BertConfig("tiny", depth=1, pool="max"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, cache=True, **REPORT),
    image_size=64,
    crop_scale=(0.9, 1.0),
    tokenizer=TokenizerConfig(vocab_size=1000, context_length=64),
    suites={
        "zeroshot_phantoms/findings": ZeroShot(
            source=HELD_OUT,
            prompts={name: FINDING_PROMPTS[name] for name in FINDINGS["chest radiograph"]},
            multi_label=True,
        ),
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
    },
    steps=1000,
    batch_size=32,
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
            image_projection="mlp",
            text_projection="mlp",
            init_temperature=0.1,
        ),
        # Image to text first.
        tasks={"contrastive": Contrastive(direction_weights=(0.75, 0.25))},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(image_size=size.image_size, resize="pad"),
            augment=Augment(crop_scale=size.crop_scale, brightness=0.4, contrast=0.4),
            tokenizer=size.tokenizer,
        ),
        optim=OptimConfig(
            lr=size.lr, warmup_steps=size.warmup_steps, weight_decay=1e-6, freeze=(r"log_scale$",)
        ),
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
