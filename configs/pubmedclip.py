"""PubMedCLIP: a trained CLIP goes on, slowly, on medical figures, until the held-out ones no longer gain.

    bvl train configs/pubmedclip.py:tiny init_from=runs/clip_tiny workdir=runs/pubmedclip_tiny
    bvl train configs/pubmedclip.py init_from=runs/clip data.root=my_figures workdir=runs/pubmedclip

It starts from a run of configs/clip.py, whose towers and vocabulary it keeps; for the first command that run is

    bvl train configs/clip.py:tiny workdir=runs/clip_tiny

`:tiny` goes on with radiographs and blood smears whose texts are reports, which the first run never read. Without it
the records of data.root need an image and a `caption`; a tenth is held out, retrieval is measured on it 20 times and
the run ends after 5 evaluations without gain. Images are cropped, and mirrored only with `:flip`, which says that
left and right do not matter in them; in `:tiny` the smears are.

Source: Eslami et al. 2021, arXiv:2112.13906. Rate 1e-5, decay 5e-4, crop, flip and patience 5 are those of the
authors' code; ROCO was their data.
Differs: the first run is one of bvl and not OpenAI's weights; AdamW instead of Adam with its decay in the gradient;
the rate is constant after 50 steps instead of falling at plateaus; the criterion is the recall at 10, not the loss.
"""

from types import SimpleNamespace

from bvl.config import CheckpointConfig, Config, EvalConfig, parse_arg
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import CLIP_MEAN, CLIP_STD, Augment, Preprocess
from bvl.evals.retrieval import Retrieval
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

# Seed and patients are others than those of clip.py.
SCANS, SMEARS = (
    Phantoms(num_patients=300, image_size=64, seed=1, modalities=(name,))
    for name in ("chest radiograph", "blood smear")
)
REPORT = dict(text="findings", cache=True)
VIT = dict(pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu")

PAPER = SimpleNamespace(
    image=ViTConfig("B/32", **VIT),
    text=TextConfig(width=512, depth=12, num_heads=8, activation="quick_gelu"),
    embed_dim=512,
    train=(Source(),),
    held_out=Source(split="val"),
    image_size=224,
    flip=False,
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=49408, context_length=77),
    init_from="runs/clip",
    steps=50_000,
    batch_size=64,
    lr=1e-5,
)
TINY = SimpleNamespace(
    image=ViTConfig("XXS/8", stem="conv", depth=1, **VIT),
    text=TextConfig(width=96, depth=1, num_heads=3, activation="quick_gelu"),
    embed_dim=64,
    train=(
        Source(name="scans", phantoms=SCANS, **REPORT),
        Source(name="smears", phantoms=SMEARS, laterality=False, **REPORT),
    ),
    held_out=Source(phantoms=SCANS, split="test", **REPORT),
    image_size=64,
    flip=True,
    tokenizer=TokenizerConfig(kind="bpe", vocab_size=1000, context_length=32),
    init_from="runs/clip_tiny",
    steps=400,
    batch_size=32,
    # Towers this small move too little at 1e-5.
    lr=1e-4,
)


def get_config(arg: str | None = None) -> Config:
    size = TINY if parse_arg(arg, tiny=False).tiny else PAPER
    return Config(
        steps=size.steps,
        batch_size=size.batch_size,
        init_from=size.init_from,
        model=DualEncoderConfig(image=size.image, text=size.text, embed_dim=size.embed_dim),
        tasks={"contrastive": Contrastive()},
        data=DataConfig(
            train=size.train,
            preprocess=Preprocess(
                image_size=size.image_size,
                mean=CLIP_MEAN,
                std=CLIP_STD,
            ),
            augment=Augment(crop_scale=(0.8, 1.0), flip_horizontal=size.flip),
            tokenizer=size.tokenizer,
        ),
        optim=OptimConfig(lr=size.lr, schedule="constant", warmup_steps=50, weight_decay=5e-4),
        eval=EvalConfig(
            every=size.steps // 20,
            suites={"retrieval_held_out": Retrieval(source=size.held_out)},
            stop_metric="retrieval_held_out/t2i_r10",
            stop_patience=5,
        ),
        checkpoint=CheckpointConfig(every=size.steps // 20, best="retrieval_held_out/t2i_r10"),
    )
