"""The model card of an export: its README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bvl.config import Config
from bvl.convert.preprocess import differences

_TITLES = {
    "open_clip": "open_clip",
    "hf": "transformers",
    "torch": "plain PyTorch (`bvl_model.py`, which needs torch, safetensors, tokenizers, numpy and Pillow)",
}
_TORCH_LINES = """import bvl_model  # this folder on sys.path

model = bvl_model.load(".")
image_embeddings = model.embed_images(["scan.png"])
text_embeddings = model.embed_texts(["a chest radiograph"])"""
# What an option is called when the architecture is described; others are in config.json.
_ARCHITECTURE = (
    "variant",
    "width",
    "depth",
    "num_heads",
    "layout",
    "pool",
    "kind",
    "embed_dim",
)


_OPTIMISER = ("name", "lr", "schedule", "warmup_steps", "weight_decay", "layer_decay", "freeze", "lora")


def model_card(
    config: Config,
    *,
    format: Literal["open_clip", "hf", "torch"],
    env: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    parity: Mapping[str, Any] | None = None,
    how_to_load: str | None = None,
    extra: Iterable[str] = (),
    step: int | None = None,
    weights_hash: str | None = None,
) -> str:
    """Markdown that says what a folder holds, how to load it, what it was made of and how good it is.

    env, evaluation: the content of the run's env.json and eval.json. parity: of the export's parity.json.
    how_to_load: lines of Python; None for the plain PyTorch file. extra: further paragraphs, such as what to do after
    the folder is moved. step, weights_hash: of the parameters that were exported; evaluations of others are left out.
    """
    towers = [name for name in ("image", "text", "decoder") if getattr(config.model, name, None) is not None]
    parts = [
        "# Biomedical vision-language model",
        f"Exported by bvl for {_TITLES[format]}. It has: {', '.join(_PARTS[name] for name in towers)}.",
        "It is research software and not a medical device: its outputs must not decide on anybody's diagnosis or "
        "treatment.",
        "## How to load",
        f"```python\n{(how_to_load or _TORCH_LINES).strip()}\n```",
        *extra,
        "## Architecture",
        _bullets(_architecture(config)),
        *_inputs(config, format),
        "## Data",
        *_data(config, env),
        "## Training",
        *_training(config, env, step),
        "## Evaluation",
        *_evaluation(evaluation, weights_hash),
        "## Is it the same model?",
        *_parity(parity),
        "## Limits",
        _bullets(_limits(config)),
    ]
    return "\n\n".join(parts) + "\n"


_PARTS = {"image": "an image tower", "text": "a text tower", "decoder": "a text decoder"}


def _architecture(config: Config) -> list[str]:
    lines = []
    for field in dataclasses.fields(config.model):
        part = getattr(config.model, field.name)
        if dataclasses.is_dataclass(part):
            given = {name: getattr(part, name, None) for name in _ARCHITECTURE}
            said = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
            lines.append(f"{field.name}: {type(part).__name__.removesuffix('Config')} ({said})")
    if config.model.image is not None or config.model.embeds_text:
        lines.append(f"embeddings: {config.model.embed_dim} numbers of unit norm")
    return lines


def _inputs(config: Config, format: str) -> list[str]:
    parts = []
    if config.model.image is not None:
        p = config.data.preprocess
        height, width = p.height_width
        first = "" if p.resize_to is None else f" to {p.resize_to}"
        how = {
            "shortest_crop": f"the shortest side is resized{first} and the centre cut out",
            "squash": f"resized{first} whatever the aspect ratio",
            "pad": f"resized as a whole and padded with the grey value {p.fill}",
        }[p.resize]
        crop = ", and the centre cut out" if p.resize == "squash" and p.resize_to is not None else ""
        lines = [
            f"size: {width}x{height} pixels (width x height), RGB",
            f"geometry: {how}{crop}, {p.interpolation}",
            f"mean {_numbers(p.mean)}, standard deviation {_numbers(p.std)}, of values in 0..1",
        ]
        if format != "torch":
            lines += differences(p, format)
        parts += ["## Images", _bullets(lines)]
    if config.model.text is not None or config.model.decoder is not None:
        parts += [
            "## Texts",
            f"`tokenizer.json`, at most {config.data.tokenizer.context_length} tokens with start and end; longer texts "
            f"are cut and keep their end token.",
        ]
    return parts


def _data(config: Config, env: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None) -> list[str]:
    """Which sources, how many records, under which licences: as the run's last start counted them."""
    starts = _starts(env)
    licences = starts[-1].get("licences") if starts else None
    if not licences:
        return ["Nothing is recorded about the data this model was trained on."]
    rows = [
        (source, licence, str(count))
        for source, counts in licences.items()
        for licence, count in counts.items()
    ]
    parts = [
        _table(("source", "licence", "records"), rows),
        "The licences are those that the records state; they may bind what is done with the weights.",
    ]
    if config.init_sources:
        parts.append(f"What {', '.join(config.init_sources)} was trained on before is not in the table.")
    return parts


def _training(
    config: Config, env: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None, step: int | None
) -> list[str]:
    starts = _starts(env)
    if not starts:
        return [
            "Nothing is recorded about its training; weights that bvl took over from elsewhere have no record."
        ]
    tasks = ", ".join(f"{name} ({_described(task)})" for name, task in config.tasks.items())
    optim = ", ".join(
        f"{name} {value}"
        for name in _OPTIMISER
        if (value := getattr(config.optim, name, None)) not in (None, (), {})
    )
    sources = ", ".join(config.init_sources) or "random values"
    done = "" if step in (None, config.steps) else f"{step} of "
    lines = [
        f"tasks: {tasks}",
        f"{done}{config.steps} steps of {config.batch_size} examples, {config.precision}",
        f"optimiser: {optim}",
        f"started from: {sources}",
        f"seed {config.seed}, {len(starts)} start(s), on {', '.join(starts[-1].get('devices', ())) or 'unknown devices'}",
    ]
    packages = starts[-1].get("packages", {})
    if packages:
        lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    return [_bullets(lines)]


def _described(task: Any) -> str:
    """A task's class, and those of its options that are not the default."""
    options = [
        f"{field.name} {getattr(task, field.name)}"
        for field in dataclasses.fields(task)
        if field.default_factory is dataclasses.MISSING and getattr(task, field.name) != field.default
    ]
    return ", ".join([type(task).__name__, *options])


def _evaluation(evaluation: Mapping[str, Any] | None, weights_hash: str | None) -> list[str]:
    rows, evaluation = [], evaluation or {}
    # Suites that were run on other parameters, such as those of a later step.
    others = {
        f"{suite}/": provenance.get("step")
        for name, provenance in evaluation.items()
        for suite, _, end in [name.rpartition("/")]
        if end == "provenance" and weights_hash not in (None, provenance.get("weights_hash"))
    }
    for name, value in evaluation.items():
        if name.startswith(tuple(others)):
            continue
        if not isinstance(value, int | float) or name.endswith("/chance"):
            continue
        interval, chance = evaluation.get(f"{name}/ci95"), evaluation.get(f"{name}/chance")
        if interval is None and not name.endswith("/num_images"):  # other counts, and the parts of means
            continue
        rows.append(
            (
                name,
                _number(value),
                f"{_number(interval[0])} to {_number(interval[1])}" if interval else "",
                _number(chance) if chance is not None else "",
            )
        )
    if not rows:
        steps = ", ".join(map(str, dict.fromkeys(others.values())))
        return [f"This model was not evaluated{f'; its run was, at step {steps}' if others else ''}."]
    return [
        _table(("metric", "value", "95 % interval", "chance"), rows),
        "Intervals are bootstrapped by patient, or by image where a set names no patients.",
    ]


def _parity(parity: Mapping[str, Any] | None) -> list[str]:
    if parity is None or not parity.get("checked"):
        return [
            "Nobody has compared this folder's outputs with those of the model it was made from (--no-check)."
        ]
    verdict = "passed" if parity.get("passed") else "FAILED"
    rows = [(name, f"{value:.1e}") for name, value in parity.get("largest", {}).items()]
    parts = [f"The comparison with bvl's outputs on fixed inputs {verdict}; `parity.json` has every layer."]
    if rows:
        parts.append(_table(("outputs", "largest difference"), rows))
    inputs = parity.get("inputs") or {}
    lines = []
    if inputs.get("grey_levels") is not None:
        lines.append(f"pixels of the same image: {inputs['grey_levels']:g} grey level(s) apart at most")
    if inputs.get("texts") is not None:
        texts = ", ".join(repr(text[:40]) for text in inputs["texts"])
        lines.append(f"token ids of the same text: {f'DIFFERENT for {texts}' if texts else 'equal'}")
    lines += [f"{part}: not compared ({why})" for part, why in (inputs.get("why") or {}).items()]
    return [*parts, _bullets(lines)] if lines else parts


def _limits(config: Config) -> list[str]:
    lines = [
        "it knows the kinds of images, the language and the patients of its data, and fails silently on others",
        "scores are not probabilities of disease",
    ]
    if config.model.decoder is not None:
        lines.append("written texts can be fluent and wrong")
    return lines


def _starts(env: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    # Run folders of older versions hold the last start alone.
    return [env] if isinstance(env, Mapping) else list(env or ())


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
