"""Miniatures of training: real data path, towers, task and step, on phantoms so small that a run takes seconds.

Every picture is a phantom of 32 pixels, half of them printed as negatives and two thirds with a covered side: three
facts of a picture (modality, tone, cover) that one convolutional layer learns in some dozen steps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bvl.config import Config
from bvl.data.arrays import Arrays
from bvl.data.phantoms import MODALITIES, Phantoms, PhantomSource
from bvl.data.pipeline import DataConfig, Pipeline
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.mesh import MeshConfig, make_mesh, replicated, to_global, unbox
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import Components, Encoder, build_model
from bvl.tasks.base import ModelInfo
from bvl.tasks.contrastive import Contrastive, embed_images, embed_texts
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.program import Program, TrainState
from bvl.train.step import make_train_step

# Names of the facts in words that stand in all tests' texts.
MODALITY = dict(zip(MODALITIES, ("radiograph", "fundus", "smear", "ultrasound"), strict=True))
TONES, COVERS = ("positive", "negative"), ("open", "left", "right")
IMAGE_SIZE = 32
PREPROCESS = Preprocess(image_size=IMAGE_SIZE)
# More than any run takes.
STEPS = 1000
# Every word of all tests, so that each is one token.
WORDS = " ".join((*MODALITY.values(), *TONES, *COVERS)) + (
    " a picture photo of the with common name printed print bright dark view grey coloured . alfa bravo charlie delta"
    " echo foxtrot golf hotel india juliett kilo lima thorax retina sanguis abdomen lumen umbra"
)

MODEL = DualEncoderConfig(
    image=ViTConfig("XXS/8", pool="mean", width=32, depth=1, num_heads=2),
    text=TextConfig(width=32, depth=1, num_heads=2, causal=False, pool="mean"),
    embed_dim=16,
)
PLAIN = Contrastive()
OPTIM = OptimConfig(lr=3e-3, schedule="constant", warmup_steps=5, weight_decay=0.0)


@functools.cache
def pictures(split: str, count: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(images uint8 [n, 32, 32, 3], records with the facts), drawn from the phantoms of a split."""
    phantoms = PhantomSource(
        Phantoms(num_patients=2 * count, image_size=IMAGE_SIZE, val_fraction=0.4, seed=5)
    )
    indices = phantoms.indices(split)[:count]
    assert len(indices) == count, f"{split} has {len(indices)} phantoms"
    images, records = [], []
    for i in indices:
        drawn, rng = phantoms[int(i)], np.random.default_rng(int(i))
        tone, cover = str(rng.choice(TONES)), str(rng.choice(COVERS))
        image = drawn["image"].copy() if tone == "positive" else 255 - drawn["image"]
        half = IMAGE_SIZE // 3
        if cover != "open":
            image[:, :half] = image[:, :half] if cover == "right" else (0, 160, 0)
            image[:, -half:] = image[:, -half:] if cover == "left" else (0, 160, 0)
        images.append(image)
        records.append({"modality": MODALITY[drawn["modality"]], "tone": tone, "cover": cover})
    return np.stack(images), records


def source(records: list[dict[str, Any]], images: np.ndarray, **options: Any) -> Source:
    """Records in memory, with any fields, as a training source."""
    named = [{"id": str(i), "image": f"image {i}", **record} for i, record in enumerate(records)]
    return Source(arrays=Arrays.holding(images, named), split=None, **options)


@functools.cache
def tokenizer(context_length: int) -> Tokenizer:
    """One vocabulary for all tests, so that equal towers are compiled once."""
    return Tokenizer.train([WORDS], TokenizerConfig(vocab_size=1000, context_length=context_length))


_CACHE: dict[str, Any] = {}


def _once(make: Any, *options: Any) -> Any:
    """What `make(*options)` gave the first time; optimisers' options hold dicts, which cannot be hashed."""
    key = f"{make.__name__} {options!r}"
    if key not in _CACHE:
        _CACHE[key] = make(*options)
    return _CACHE[key]


def _encoder(model: DualEncoderConfig, context: int) -> Encoder:
    return Encoder(_program(model, Contrastive(), context, ()).model, PREPROCESS, _mesh())


def _mesh() -> Any:
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def _config(model: DualEncoderConfig, task: Contrastive) -> Config:
    data = DataConfig(preprocess=PREPROCESS)
    return Config(model=model, data=data, tasks={"contrastive": task}, optim=None, steps=STEPS, batch_size=1)


def _program(model: DualEncoderConfig, task: Contrastive, context: int, classes: tuple[str, ...]) -> Program:
    config = _config(model, task)
    return Program(
        model=build_model(config, tokenizer(context)),
        preprocess=PREPROCESS,
        tasks=config.tasks,
        info=ModelInfo(model.image.output_width, model.text.width, model.embed_dim, classes),
        mesh=_mesh(),
        seed=0,
        ema_decay=0.0,
        frozen={},
    )


def _fresh(model: DualEncoderConfig, context: int) -> Any:
    """Parameters before the first step, the same for every task."""
    program = _program(model, Contrastive(), context, ())
    return jax.tree.map(np.asarray, unbox(jax.jit(program.init_params)(jax.random.key(0))))


def _step(
    model: DualEncoderConfig, task: Contrastive, optim: OptimConfig, context: int, classes: tuple[str, ...]
) -> tuple[Any, Any]:
    """(optimiser, compiled step)."""
    optimizer = make_optimizer(optim, STEPS, _once(_fresh, model, context))
    return optimizer, make_train_step(_program(model, task, context, classes), optimizer, None)


# (the sources, which keep their ids, the pipeline over them, its batches so far)
_DRAWN: dict[Any, tuple[tuple[Source, ...], Pipeline, list[dict[str, np.ndarray]]]] = {}


def _batches(
    train: tuple[Source, ...],
    task: Contrastive,
    context: int,
    classes: tuple[str, ...],
    batch_size: int,
    steps: int,
) -> list[dict[str, np.ndarray]]:
    """The first batches of the sources, drawn once for all runs that read the same."""
    key = tuple(map(id, train)), task.fields(), context, classes, batch_size
    if key not in _DRAWN:
        pipeline = Pipeline(
            dataclasses.replace(_config(MODEL, task).data, train=train),
            sets=[RecordSet(one) for one in train],
            keys_of_tasks={"contrastive": task.fields()},
            tokenizer=tokenizer(context),
            classes=classes,
            batch_size=batch_size,
            seed=0,
        )
        _DRAWN[key] = train, pipeline, []
    _, pipeline, drawn = _DRAWN[key]
    drawn.extend(batch for batch, _ in pipeline.batches(start=len(drawn), stop=steps))
    return drawn[:steps]


def fit(
    *train: Source,
    task: Contrastive = PLAIN,
    model: DualEncoderConfig = MODEL,
    optim: OptimConfig = OPTIM,
    steps: int = 60,
    batch_size: int = 48,
    context: int = 16,
    classes: tuple[str, ...] = (),
    start_from: Components | None = None,
) -> tuple[Components, list[dict[str, float]]]:
    """A trained model and the task's metrics of every step."""
    fresh = _once(_fresh, model, context) if start_from is None else start_from.params
    optimizer, step = _once(_step, model, task, optim, context, classes)
    config = _config(model, task)
    params = jax.tree.map(jnp.array, fresh)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None, {"contrastive": None})
    # Where the step puts its result too; else its second call would compile it anew.
    state, rows = jax.device_put(state, replicated(_mesh())), []
    for batch in _batches(train, task, context, classes, batch_size, steps):
        state, metrics = step(state, {}, to_global(batch, _mesh()))
        rows.append(metrics["tasks"]["contrastive"])
    rows = [{name: float(total / count) for name, (total, count) in row.items()} for row in rows]
    encoder = _once(_encoder, model, context)
    components = Components(
        encoder_model(model, context),
        jax.tree.map(np.asarray, state.params),
        tokenizer(context),
        PREPROCESS,
        config,
        classes,
        encoder,
    )
    return components, rows


def encoder_model(model: DualEncoderConfig, context: int) -> Any:
    return _program(model, Contrastive(), context, ()).model


def cosines(components: Components, images: np.ndarray, texts: list[str]) -> np.ndarray:
    """[images, texts]."""
    return embed_images(components, images, batch_size=150) @ embed_texts(components, texts, batch_size=150).T


def accuracy(components: Components, images: np.ndarray, texts: list[str], truth: list[int]) -> float:
    """Share of the images whose nearest text is the true one."""
    return float((cosines(components, images, texts).argmax(1) == np.asarray(truth)).mean())
