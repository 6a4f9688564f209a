"""The models of the experiments on guided captions; `python experiments/guided_captions/run.py` trains them all.

    bvl train experiments/guided_captions/config.py:arm=dropout_0.2 workdir=runs/guided_captions/dropout_0.2
    bvl train experiments/guided_captions/config.py:arm=real data.root=path/to/data workdir=runs/guided_captions/real

Arms "scorer" and "real_scorer" are the contrastive models that judge; "scorer" goes on from "towers" (init_from), with
larger batches and contrast alone, "lengths" from "dropout_0.2" with captions alone; "noisy_plain" and "noisy_quality" read a folder
of records (data.root) in which half of the captions were shuffled; all others write captions of phantoms.
"""

from bvl.config import CheckpointConfig, Config, LogConfig, parse_arg
from bvl.data.controls import Controls
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError
from bvl.models.decoder import DecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.caption import Caption
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

PHANTOMS = Phantoms(num_patients=5000)
TEXTS = {"captions": 0.5, "findings": 0.5}
REAL = (
    Source(name="figures", subfolder="openstax_figures", text={"caption": 0.5, "alt_text": 0.5}, cache=True),
    Source(name="chest", subfolder="covid_cxr", text="caption", weight=0.25, cache=True),
)
QUALITY_BINS = 4

# arm: share of images that are dropped in training.
DROPOUTS = {"dropout_0": 0.0, "dropout_0.2": 0.2, "dropout_0.5": 0.5}
NOISY = {"noisy_plain": Controls(), "noisy_quality": Controls(quality=QUALITY_BINS)}
STEPS = {
    "scorer": 400, "lengths": 800, "noisy_plain": 500, "noisy_quality": 500, "real_scorer": 300, "real": 300
}  # fmt: skip
ARMS = ("towers", "scorer", *DROPOUTS, "lengths", *NOISY, "real_scorer", "real")


def get_config(arg: str | None = None) -> Config:
    knobs = parse_arg(arg, arm="dropout_0.2", seed=1)
    if knobs.arm not in ARMS:
        raise ConfigError(f"arm={knobs.arm!r}: choose one of {', '.join(ARMS)}")
    real = knobs.arm.startswith("real")
    judges = knobs.arm in ("towers", "scorer", "real_scorer")
    captioner = DecoderConfig(width=192 if real else 128, depth=2, num_heads=4)
    # Findings by name and captions teach a small tower on few images far faster than contrast alone.
    tasks = {} if real or knobs.arm == "lengths" else {"classify": Classify(multi_label=True)}
    if judges:
        tasks |= {"contrastive": Contrastive()}
    if knobs.arm not in ("scorer", "real_scorer"):
        tasks |= {"caption": Caption(image_dropout=0.0 if judges else DROPOUTS.get(knobs.arm, 0.2))}
    if real:
        sources, controls = REAL, Controls(sections=() if judges else ("caption", "alt_text"))
    elif knobs.arm in NOISY:
        sources, controls = (Source(text="caption", cache=True),), NOISY[knobs.arm]
    else:
        texts = {**TEXTS, "findings": 0.02} if knobs.arm == "lengths" else TEXTS
        sources = (Source(phantoms=PHANTOMS, text=texts, cache=True),)
        controls = Controls() if judges else Controls(sections=tuple(TEXTS), lengths=40)
    return Config(
        seed=0 if judges else knobs.seed,
        steps=STEPS.get(knobs.arm, 1100),
        batch_size=192 if knobs.arm == "scorer" else 64,
        model=DualEncoderConfig(
            image=ViTConfig("XS/16" if real else "XS/8", stem="conv", depth=1, pool="mean"),
            text=TextConfig(width=96, depth=1, num_heads=3, causal=False, pool="mean") if judges else None,
            decoder=captioner if "caption" in tasks else None,
            embed_dim=128,
        ),
        tasks=tasks,
        data=DataConfig(
            train=sources,
            texts_per_image=2 if real and judges else 1,
            preprocess=Preprocess(image_size=112 if real else 64, resize="pad" if real else "squash"),
            augment=Augment(crop_scale=(0.6, 1.0)) if real else Augment(),
            tokenizer=TokenizerConfig(
                vocab_size=3000 if real else 800,
                context_length=64 if real else 28 if knobs.arm in NOISY else 56,
            ),
            controls=controls,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=50, tensorboard=False),
    )
