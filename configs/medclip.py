"""MedCLIP: images and reports match by how much their labels agree, not only within a pair.

    bvl train configs/medclip.py:tiny workdir=runs/medclip_tiny
    bvl train configs/medclip.py data.root=my_radiographs workdir=runs/medclip

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores. Without it the records of data.root need an
image, `labels` (findings; an empty list for none) and `findings` or `impression`; a tenth is held out by patient.
Records without labels are left out of training.

Source: Wang et al. 2022, arXiv:2210.10163. The soft targets are the paper's semantic matching; rate, decay, batch and the 512
dimensions are as we remember the authors' code, not checked.
Differs: pairs are read as pairs, where the paper draws images and texts apart from sets that need not be paired;
labels come with the records, not from entities found in the text; the similarity is the cosine over
target_temperature 0.2 instead of the plain product of the label vectors; a ResNet-50 (the paper's smaller model;
Swin is its larger) and a BERT start from random weights.
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
REPORT = {"findings": 0.5, "impression": 0.5}

PAPER = SimpleNamespace(
    image=ResNetConfig("ResNet50"),
    text=BertConfig("clinicalbert", pool="mean", pool_layers=(1, 2, -1)),
    embed_dim=512,
    train=Source(text=REPORT),
    image_size=224,
    tokenizer=TokenizerConfig(vocab_size=28996, lowercase=False, context_length=128),
    suites={
        "retrieval_held_out": Retrieval(source=Source(split="val", text=REPORT)),
        "zeroshot_held_out": ZeroShot(source=Source(split="val"), multi_label=True),
    },
    steps=40_000,
    batch_size=100,
    precision="bfloat16",
    optim=OptimConfig(lr=5e-5, weight_decay=1e-4, warmup_steps=4000),
)
TINY = SimpleNamespace(
    image=ResNetConfig("ResNet18", width=16, stages=(1, 1, 1, 1)),
    text=BertConfig("tiny", depth=1, pool="mean"),
    embed_dim=64,
    train=Source(phantoms=PHANTOMS, text=REPORT, cache=True),
    image_size=64,
    tokenizer=TokenizerConfig(vocab_size=1000, context_length=64),
    suites={
        "retrieval_phantoms": Retrieval(source=HELD_OUT, max_images=300),
        "zeroshot_phantoms/findings": ZeroShot(
            source=HELD_OUT,
            prompts={name: FINDING_PROMPTS[name] for name in FINDINGS["chest radiograph"]},
            multi_label=True,
        ),
    },
    steps=1000,
    batch_size=64,
    precision="float32",
    optim=OptimConfig(lr=1e-3, weight_decay=1e-4, warmup_steps=50),
)


def get_config(arg: str | None = None) -> Config:
    size = TINY if parse_arg(arg, tiny=False).tiny else PAPER
    return Config(
        steps=size.steps,
        batch_size=size.batch_size,
        precision=size.precision,
        model=DualEncoderConfig(image=size.image, text=size.text, embed_dim=size.embed_dim),
        tasks={"contrastive": Contrastive(targets="label_similarity", target_temperature=0.2)},
        data=DataConfig(
            train=(size.train,),
            preprocess=Preprocess(image_size=size.image_size, resize="pad"),
            augment=Augment(crop_scale=(0.9, 1.0), brightness=0.1, contrast=0.1),
            tokenizer=size.tokenizer,
        ),
        optim=size.optim,
        eval=EvalConfig(suites=size.suites),
        checkpoint=CheckpointConfig(every=1000),
    )
