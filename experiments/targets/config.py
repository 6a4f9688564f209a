"""One arm of the experiments on what counts as a positive pair; `python experiments/targets/run.py` trains them all.

    bvl train experiments/targets/config.py:arm=captions_two,seed=1 workdir=runs/targets/captions_two_1
    bvl train experiments/targets/config.py:arm=figures_two data.root=path/to/openstax_figures workdir=runs/figures

Arms named repeats_* and captions_* train on phantoms, figures_* on real textbook figures.
"""

from bvl.config import CheckpointConfig, Config, EvalConfig, LogConfig, parse_arg
from bvl.data.phantoms import FINDING_PROMPTS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=3000, modalities=("chest radiograph", "fundus photograph"))
# What the two modalities can show.
PROMPTS = {
    name: prompts
    for name, prompts in FINDING_PROMPTS.items()
    if prompts["positive"][0].startswith(PHANTOMS.modalities)
}
# Half of the texts name the labels alone, so that many images share one.
REPEATED = {"labels": 0.5, "captions": 0.5}

# arm: (the task's targets, the text that is read, texts an image)
ARMS = {
    "repeats_diagonal": (dict(targets="diagonal"), REPEATED, 1),
    "repeats_overlapping_labels": (dict(targets="overlapping_labels"), REPEATED, 1),
    "repeats_label_similarity": (
        dict(targets="label_similarity", target_temperature=0.1),
        REPEATED,
        1,
    ),
    "captions_one": ({}, "captions", 1),
    "captions_two": ({}, "captions", 2),
    "captions_image_to_text": (dict(direction_weights=(0.75, 0.25)), "captions", 1),
    "figures_caption": ({}, "caption", 1),
    "figures_two": ({}, {"caption": 0.5, "alt_text": 0.5}, 2),
}


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, arm="captions_one", seed=0)
    if knobs.arm not in ARMS:
        raise ConfigError(f"arm={knobs.arm!r}: choose one of {', '.join(ARMS)}")
    task, text, texts_per_image = ARMS[knobs.arm]
    figures = knobs.arm.startswith("figures")
    if figures:
        train = Source(name="figures", text=text, cache=True)
        held_out = Source(name="figures", split="val", cache=True)
        suites = {
            f"retrieval_figures/{field}": Retrieval(source=held_out, text=field)
            for field in ("caption", "alt_text")
        }
    else:
        train = Source(phantoms=PHANTOMS, text=text, templates=("an image that shows {}",), cache=True)
        held_out = Source(phantoms=PHANTOMS, split="test", cache=True)
        suites = {
            "zeroshot_phantoms": ZeroShot(source=held_out, prompts=PROMPTS, multi_label=True),
            "retrieval_phantoms": Retrieval(source=held_out, max_images=500),
        }
    return Config(
        seed=knobs.seed,
        steps=200 if figures else 350,
        batch_size=64,
        model=DualEncoderConfig(
            image=ViTConfig("XS/16" if figures else "XS/8", stem="conv", depth=1, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean"),
            embed_dim=128,
        ),
        tasks={"contrastive": Contrastive(**task)},
        data=DataConfig(
            train=(train,),
            texts_per_image=texts_per_image,
            preprocess=Preprocess(image_size=112 if figures else 64, resize="pad" if figures else "squash"),
            augment=Augment(crop_scale=(0.6, 1.0)) if figures else Augment(),
            tokenizer=TokenizerConfig(
                vocab_size=3000 if figures else 800, context_length=64 if figures else 28
            ),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30),
        eval=EvalConfig(suites=suites),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=50, tensorboard=False),
    )
