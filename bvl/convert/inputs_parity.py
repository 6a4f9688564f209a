"""The proof of what stands before the model: the same image file gives the same pixels, the same text the same ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from bvl.convert.clip_text import BPE_TOKENS
from bvl.convert.families import Library
from bvl.convert.peers import import_peer
from bvl.data.text import Tokenizer
from bvl.data.transforms import Preprocess, apply

# Resizing in floating point and in integers rounds a value to one of two neighbours.
MAX_GREY_LEVELS = 1.0

PROBE_TEXTS = (
    "a chest radiograph",
    "Two nodules (8 mm and 12 mm) in the left upper lobe; no effusion.",
    "",
    "MRI of the brain, axial T2-weighted: hyperintense lesion near the lateral ventricle, " * 12,
)


@dataclasses.dataclass(frozen=True)
class InputsParity:
    """grey_levels: largest difference of a pixel; texts: those whose ids differ. `why`: why a part was not compared."""

    grey_levels: float | None
    texts: tuple[str, ...] | None
    why: Mapping[str, str]

    @property
    def within(self) -> bool:
        return (self.grey_levels or 0.0) <= MAX_GREY_LEVELS and not self.texts


def compare_inputs(
    library: Library,
    folder: Path,
    foreign: Mapping[str, Any],
    *,
    preprocess: Preprocess | None,
    tokenizer: Tokenizer | None,
    words_alone: bool = False,
    padding: bool = False,
) -> InputsParity:
    """Compare preprocessing and tokenizer with those that the library reads from the folder; None is not compared.

    words_alone: compare the ids of the words, without the tokens before and after them. padding: compare what stands
    behind a text too, which some models read.
    """
    why: dict[str, str] = {}
    grey_levels = texts = None
    if preprocess is not None:

        def pixels() -> float:
            transform = _pixels[library](folder, foreign, preprocess.height_width)
            return max(_grey_levels(transform, preprocess, image) for image in probe_images())

        grey_levels = _guarded(pixels, why, "pixels")
    if tokenizer is not None:

        def differing() -> tuple[str, ...]:
            encode = _tokens[library](folder, foreign, tokenizer, words_alone, padding)
            return tuple(
                text for text in PROBE_TEXTS if not _same_ids(encode, tokenizer, text, words_alone, padding)
            )

        texts = _guarded(differing, why, "tokens")
    return InputsParity(grey_levels, texts, why)


def probe_images() -> tuple[Image.Image, ...]:
    """Fixed smooth pictures with some noise: wide, tall, small and grey, of sides that no model has."""
    rng = np.random.default_rng(0)
    images = []
    for height, width in ((301, 427), (533, 219), (97, 61)):
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(20 * x * y)], -1)
        pixels = 127.5 + 90.0 * waves + rng.normal(0, 10, waves.shape)
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return (*images, images[0].convert("L"))


def _grey_levels(
    transform: Callable[[Image.Image], Float[np.ndarray, "h w 3"]], preprocess: Preprocess, image: Image.Image
) -> float:
    ours = apply(image.convert("RGB"), preprocess=preprocess).image.astype(np.float32)
    theirs = transform(image.convert("RGB")) * np.asarray(preprocess.std) + np.asarray(preprocess.mean)
    if theirs.shape != ours.shape:
        return float("inf")
    return float(np.abs(np.rint(theirs * 255.0) - ours).max())


def _same_ids(
    encode: Callable[[str], list[int]], tokenizer: Tokenizer, text: str, words_alone: bool, padding: bool
) -> bool:
    """Equal up to the end of the text, or to that of its padding; who does not read it may have another there."""
    if words_alone:
        return encode(text) == tokenizer.ids(text)[: tokenizer.context_length]
    ids, mask, _ = tokenizer.encode(text)
    used = len(ids) if padding else int(mask.sum())
    return encode(text)[:used] == ids[:used].tolist()


def _guarded(compare: Callable[[], Any], why: dict[str, str], part: str) -> Any:
    """What `compare` gives, or None with the reason where the folder has nothing that the library could read."""
    try:
        return compare()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        why[part] = lines[0][:200] if lines else type(error).__name__
        return None


def _open_clip_pixels(folder: Path, foreign: Mapping[str, Any], size: tuple[int, int]) -> Callable:
    import_peer("open_clip", what="the proof")
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    if "preprocess_cfg" not in foreign:
        raise ValueError("open_clip_config.json has no preprocess_cfg")
    options = merge_preprocess_dict(PreprocessCfg(size=size), foreign["preprocess_cfg"])
    transform = image_transform_v2(PreprocessCfg(**{**options, "size": size}), is_train=False)
    return lambda image: transform(image).numpy().transpose(1, 2, 0)


def _open_clip_tokens(
    folder: Path, foreign: Mapping[str, Any], tokenizer: Tokenizer, words_alone: bool, padding: bool
) -> Callable[[str], list[int]]:
    open_clip = import_peer("open_clip", what="the proof")
    text_cfg = foreign["model_cfg"]["text_cfg"]
    rows = text_cfg.get("vocab_size", BPE_TOKENS)
    if not text_cfg.get("hf_tokenizer_name") and rows < BPE_TOKENS:
        raise ValueError(
            f"text_cfg names no tokenizer, and open_clip's own has {BPE_TOKENS} tokens for {rows} embeddings"
        )
    theirs = open_clip.get_tokenizer(
        f"local-dir:{folder.absolute()}", context_length=tokenizer.context_length
    )
    return lambda text: theirs([text])[0].tolist()


def _hf_pixels(folder: Path, foreign: Mapping[str, Any], size: tuple[int, int]) -> Callable:
    transformers = import_peer("transformers", what="the proof")
    if (
        not (folder / "preprocessor_config.json").is_file()
        and not (folder / "processor_config.json").is_file()
    ):
        raise ValueError("no preprocessor_config.json in the folder")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return lambda image: np.asarray(
        processor(image, return_tensors="np")["pixel_values"][0], np.float32
    ).transpose(1, 2, 0)


def _hf_tokens(
    folder: Path, foreign: Mapping[str, Any], tokenizer: Tokenizer, words_alone: bool, padding: bool
) -> Callable[[str], list[int]]:
    transformers = import_peer("transformers", what="the proof")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"truncation": True, "max_length": tokenizer.context_length}
    if padding:
        options["padding"] = "max_length"
    return lambda text: list(theirs(text, add_special_tokens=not words_alone, **options)["input_ids"])


_pixels = {"open_clip": _open_clip_pixels, "hf": _hf_pixels}
_tokens = {"open_clip": _open_clip_tokens, "hf": _hf_tokens}
