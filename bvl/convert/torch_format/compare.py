"""The exported PyTorch file beside the model it came from: what each method gives for the same images and texts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bvl.convert.peers import import_peer

# (what was compared, largest absolute difference, the same as a share of the largest value)
Compared = tuple[str, float, float]

TEXTS = (
    "a nodule in the left lung",
    "no finding",
    "slide of a tumour with necrosis, 2.5 cm; margins are clear",
)
PHRASES = ("a nodule", "left lung")
REGION = [0.1, 0.2, 0.7, 0.9]


def load_torch_file(folder: Path) -> ModuleType:
    """The module bvl_model.py of an exported folder; raises ConversionError without torch."""
    import_peer("torch", what="running bvl_model.py")
    name = f"bvl_model_{abs(hash(str(folder.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, folder / "bvl_model.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up here.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def probe_images() -> list[np.ndarray]:
    """Three images of different shapes, of smooth waves and noise, the last one grey."""
    rng = np.random.default_rng(0)
    out = []
    for height, width in ((96, 128), (128, 80), (64, 64)):
        y, x = np.mgrid[:height, :width] / 24.0
        waves = np.stack([np.sin(x + i) * np.cos(y * (1 + i)) for i in range(3)], axis=-1)
        out.append(np.clip(128 + 90 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8))
    return [*out[:2], out[2][..., 0]]


def compare_torch(
    model: Any,
    folder: Path,
    *,
    images: Sequence[Any] | None = None,
    texts: Sequence[str] = TEXTS,
) -> list[Compared]:
    """What every method that the model is trained for gives, here and in the folder's file; logits of a language model.

    model: has the methods of `bvl.Model`. Written texts are compared as they are: the difference is the number, and the
    share, of those that are not equal. Raises ConversionError without torch.
    """
    images = probe_images() if images is None else list(images)
    peer = load_torch_file(Path(folder)).load(folder)
    compared = [
        (name, *(_texts if written else _arrays)(run(model), run(peer)))
        for name, written, run in _calls(peer.config, images, list(texts))
    ]
    if peer.config["decoder"] and not peer.config["pooled_widths"]["image"]:
        # No method writes without an image.
        compared.append(("next tokens", *_arrays(*_next_tokens(model, peer, list(texts)))))
    return compared


def _next_tokens(model: Any, peer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(our, their) logits [n, v] of the token after each one of the texts, by a decoder that sees no images."""
    import torch

    tokens, mask = model.components.tokenizer.encode_texts(texts)
    variables = {"params": model.params["model"]}
    hidden = model.components.model.apply(variables, None, None, tokens, mask, method="decode_train")
    table = model.components.model.apply(variables, method="vocabulary")
    with torch.no_grad():
        ids, there = map(torch.from_numpy, peer.tokenizer.encode_texts(texts))
        theirs = peer.decoder.logits(peer.decoder(None, None, ids, there)[there])
    return np.asarray(hidden)[mask] @ np.asarray(table).T, theirs.numpy()


def _calls(
    config: dict[str, Any], images: list[Any], texts: list[str]
) -> Iterator[tuple[str, bool, Callable[[Any], Any]]]:
    """(name, whether it gives texts, the call) of what the model can do."""
    tasks = config["tasks"]
    sees, reads = config["pooled_widths"]["image"], config["pooled_widths"]["text"]
    few = {"batch_size": 4}
    if sees:
        yield "embed_images", False, lambda m: m.embed_images(images, **few)
    if reads:
        yield "embed_texts", False, lambda m: m.embed_texts(texts, **few)
        yield "embed_texts/chunks", False, lambda m: m.embed_texts(texts, long="chunks", **few)
    if sees and reads:
        yield "classify", False, lambda m: m.classify(images, texts, **few)
    if sees and reads and tasks["heat_maps"]:
        yield "heat_maps", False, lambda m: m.heat_maps(images, PHRASES, **few)
    if sees and tasks["caption"]:
        options = {"greedy": {}, "two beams": {"beams": 2}}
        if config["decoder"]["null"]:
            options["guidance 2"] = {"guidance": 2.0}
        if lengths := config["controls"]["lengths"]:
            options["length"] = {**options.get("guidance 2", {}), "length": lengths[0][0]}
        for name, how in options.items():
            yield f"caption/{name}", True, lambda m, how=how: m.caption(images, **how, **few)
    if tasks["describe"]:
        regions = [[{"box": REGION}, {"point": [0.4, 0.5]}]] * len(images)
        for name, how in {"greedy": {}, "guidance 2": {"guidance": 2.0}}.items():
            yield (
                f"describe/{name}",
                True,
                lambda m, how=how: sum(m.describe(images, regions=regions, **how, **few), []),
            )
    if tasks["ground"] and tasks["ground"]["boxes"]:
        for name in ("boxes", "scores"):
            yield (
                f"ground/{name}",
                False,
                lambda m, name=name: np.stack([getattr(g, name) for g in m.ground(images, PHRASES, **few)]),
            )
    if tasks["ground"] and tasks["ground"]["masks"]:
        yield "segment", False, lambda m: _flat(m.segment(images, PHRASES, **few))
    if tasks["detect"]:
        everything = {"threshold": 0.0, "iou_threshold": 1.0, "max_detections": 10_000}
        # Candidates of all but equal scores may change places, so each column is sorted.
        yield (
            "detect",
            False,
            lambda m: _flat(
                np.sort(np.column_stack([d.boxes, d.scores]), axis=0)
                for d in m.detect(images, PHRASES, **everything, **few)
            ),
        )


def _flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in arrays])


def _texts(ours: list[str], theirs: list[str]) -> tuple[float, float]:
    different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return float(different), different / len(ours)


def _arrays(ours: Any, theirs: Any) -> tuple[float, float]:
    if isinstance(ours, list):
        ours, theirs = _flat(ours), _flat(theirs)
    if ours.shape != theirs.shape or not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return float("inf"), float("inf")
    absolute = float(np.nanmax(np.abs(ours - theirs), initial=0.0))
    largest = float(np.nanmax(np.abs(ours), initial=0.0))
    return absolute, absolute / largest if largest else absolute
