"""UniMed-CLIP: labelled sets become captions by templates and are mixed with captioned ones, each as often.

    bvl train configs/unimed_clip.py:tiny workdir=runs/unimed_clip_tiny
    bvl train configs/unimed_clip.py data.root=my_sets workdir=runs/unimed_clip

`:tiny` shows the same on phantoms, in a few minutes on two CPU cores: radiographs and ultrasound images have
captions, fundus photographs and blood smears nothing but labels. Without it data.root holds a folder of records for
each source: `figures` with a `caption`; `radiographs`, `fundus` and `pathology` with `labels`. Other folders are
named by data.train.1.subfolder=ct and data.train.1.templates, or here. A tenth of each is held out.

Source: Khattak et al. 2024, arXiv:2412.10372. Towers, context 256, warm-up, batch and the factor 1 for each source
are those of the authors' code (ViT-B/16).
Differs: both towers start from random weights, not from MetaCLIP and BiomedBERT; the templates are ours, and one text
names all labels of an image; a factor of 1 makes each source equally frequent here, whatever its size; equal texts
of a batch are each other's positives, which labels need; the rate is ours; the steps are 10 epochs of 5.3 M pairs,
to be lowered to fit your data.
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

TEMPLATES = {
    "radiographs": ("a radiograph showing {}", "an x-ray image with {}", "{} in a radiograph"),
    "fundus": ("a fundus photograph showing {}", "a retinal photograph with {}", "{} in a fundus photograph"),
    "pathology": ("a micrograph showing {}", "a stained slide with {}", "{} in a section of tissue"),
    "smears": ("a blood smear showing {}", "a blood film with {}", "{} in a blood smear"),
}


def phantoms(*modalities: str, seed: int) -> Phantoms:
    return Phantoms(num_patients=1000, image_size=64, seed=seed, modalities=modalities)


CAPTIONED = phantoms("chest radiograph", "ultrasound image", seed=0)
FUNDUS, SMEARS = phantoms("fundus photograph", seed=1), phantoms("blood smear", seed=2)
ALL = Phantoms(num_patients=1000, image_size=64, seed=3)
VIT = dict(pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu")

PAPER = SimpleNamespace(
    image=ViTConfig("B/16", **VIT),
    text=BertConfig("pubmedbert", pool="cls"),
    embed_dim=512,
    train=(
        Source(name="figures", subfolder="figures", weight=1.0),
        *(
            Source(name=name, subfolder=name, text="labels", templates=TEMPLATES[name], weight=1.0)
            for name in ("radiographs", "fundus", "pathology")
        ),
    ),
    image_size=224,
    tokenizer=TokenizerConfig(vocab_size=30522, context_length=256),
    suites={
        "retrieval_figures": Retrieval(source=Source(name="figures", subfolder="figures", split="val")),
        "zeroshot_fundus": ZeroShot(
            source=Source(name="fundus", subfolder="fundus", split="val"),
            templates=TEMPLATES["fundus"],
            multi_label=True,
        ),
    },
    steps=26_000,
    batch_size=2048,
    precision="bfloat16",
    lr=1e-4,
    warmup_steps=2000,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=BertConfig("tiny", depth=1, pool="cls"),
    embed_dim=64,
    train=(
        Source(name="figures", phantoms=CAPTIONED, text="captions", cache=True),
        Source(name="fundus", phantoms=FUNDUS, text="labels", templates=TEMPLATES["fundus"], cache=True),
        Source(name="smears", phantoms=SMEARS, text="labels", templates=TEMPLATES["smears"], cache=True),
    ),
    image_size=64,
    tokenizer=TokenizerConfig(vocab_size=1000, context_length=32),
    suites={
        "zeroshot_phantoms/modality": ZeroShot(
            source=Source(phantoms=ALL, split="test", cache=True), by="modality", prompts=MODALITY_PROMPTS
        ),
        "retrieval_figures": Retrieval(
            source=Source(phantoms=CAPTIONED, split="test", cache=True), max_images=300
        ),
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
        model=DualEncoderConfig(image=size.image, text=size.text, embed_dim=size.embed_dim),
        tasks={"contrastive": Contrastive(targets="same_text")},
        data=DataConfig(
            train=size.train,
            preprocess=Preprocess(
                image_size=size.image_size,
                mean=CLIP_MEAN,
                std=CLIP_STD,
            ),
            augment=Augment(crop_scale=(0.9, 1.0)),
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
