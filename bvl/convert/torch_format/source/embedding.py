"""Embeddings and zero-shot classes, by the model with its tokenizer and preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bvl.convert.torch_format.source.controls import Controls
from bvl.convert.torch_format.source.errors import UserError, logger
from bvl.convert.torch_format.source.features import ImageFeatures
from bvl.convert.torch_format.source.images import Preprocess, Shown
from bvl.convert.torch_format.source.layers import sigmoid
from bvl.convert.torch_format.source.network import Network
from bvl.convert.torch_format.source.sentences import split_to_context
from bvl.convert.torch_format.source.text import Tokenizer


def predicts(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs without gradients, every part in its evaluation mode, and leaves the modes as they were."""

    @functools.wraps(method)
    def run(self: Embedder, *args: Any, **kwargs: Any) -> Any:
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return run


class Embedder(Network):
    """The network with what it needs to read images and texts of users."""

    def __init__(self, config: dict[str, Any], folder: Path):
        super().__init__(config)
        self.folder = folder
        self.tokenizer = Tokenizer(folder / "tokenizer.json", config["tokenizer"])
        self.preprocess = Preprocess.load(folder / "preprocess.json")
        self.controls = Controls(config["controls"], self.tokenizer)
        self.heads: dict[str, Tensor] = {}
        # Presence logits of held-out phrases that were absent, of exactly these weights.
        self.negatives: list[float] | None = None

    @predicts
    def features(
        self, images: Sequence[Any], *, levels: bool = False, patch_embed: bool = False
    ) -> tuple[list[Shown], ImageFeatures]:
        """(the images as the model sees them, their features)."""
        shown = [self.preprocess(image) for image in images]
        pixels = torch.from_numpy(np.stack([one.pixels for one in shown]))
        return shown, self.encode_image(self.normalize(pixels), levels=levels, patch_embed=patch_embed)

    @predicts
    def embed_images(self, images: Iterable[Any], *, batch_size: int = 64) -> np.ndarray:
        """Unit-norm embeddings [n, d] of images."""
        images = several(images)
        parts = [
            self.features(images[start : start + batch_size])[1].embed
            for start in range(0, len(images), batch_size)
        ]
        return self._stacked(parts)

    @predicts
    def embed_texts(self, texts: Iterable[str], *, long: str = "cut", batch_size: int = 64) -> np.ndarray:
        """Unit-norm embeddings [n, d] of texts.

        long: "cut" drops what exceeds the context length, as in training; "chunks" reads long texts whole, in pieces of
        complete sentences, and gives the mean of the pieces' embeddings weighted by their numbers of tokens.
        """
        if isinstance(texts, str):
            raise UserError(f"embed_texts takes a list of texts; for one write [{texts[:40]!r}]")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"embed_texts takes strings, not {type(text).__name__}")
        if long not in ("cut", "chunks"):
            raise UserError(f"long={long!r}: texts beyond the context are 'cut' or read in 'chunks'")
        if long == "cut":
            self._warn_of_cuts(texts)
        pieces = [[text] if long == "cut" else split_to_context(text, self.tokenizer) for text in texts]
        every = [piece for some in pieces for piece in some]
        parts = []
        for start in range(0, len(every), batch_size):
            tokens, mask = self._encoded(every[start : start + batch_size])
            parts.append(self.encode_text(tokens, mask).embed)
        embed = self._stacked(parts)
        if len(every) == len(texts):
            return embed
        weights = np.maximum(self.tokenizer.lengths(every), 1).astype(np.float32)
        starts = np.cumsum([0, *(len(some) for some in pieces[:-1])])
        sums = np.add.reduceat(embed * weights[:, None], starts)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    @predicts
    def classify(
        self, images: Iterable[Any], prompts: Any, multi_label: bool = False, *, batch_size: int = 64
    ) -> np.ndarray:
        """Zero-shot class probabilities [n, c]; columns are the classes in the order of `prompts`.

        prompts: one text a class, or several (their embeddings are averaged), as a list or as a dict class -> texts.
        multi_label: each class on its own. Where every class is {"positive": texts, "negative": texts}, that is the
        softmax of the two; else sigmoid(scale * cosine + bias).
        """
        if isinstance(prompts, str):
            raise UserError("classify takes a list of prompts, one a class, or a dict class -> prompts")
        given = list(prompts.values() if isinstance(prompts, Mapping) else prompts)
        pairs = [isinstance(prompt, Mapping) for prompt in given]
        if any(pairs) and not (multi_label and all(pairs)):
            raise UserError(
                "positive and negative prompts need multi_label=True, and then every class needs both"
            )
        if not given or (len(given) < 2 and not multi_label):
            raise UserError(f"{len(given)} classes given; choosing one needs at least two")
        scale, bias = (float(x) for x in self.logit_scale_and_bias())
        if any(pairs):
            for prompt in given:
                if set(prompt) != {"positive", "negative"}:
                    raise UserError(f"a class has 'positive' and 'negative' prompts, not {', '.join(prompt)}")
            positive, negative = (
                self._embed_prompts([prompt[side] for prompt in given]) for side in ("positive", "negative")
            )
            classes, bias = positive - negative, 0.0
        else:
            classes = self._embed_prompts(given)
        cosines = self.embed_images(images, batch_size=batch_size) @ classes.T
        if multi_label:
            return sigmoid((scale * cosines + bias).astype(np.float32))
        return torch.from_numpy(scale * cosines).softmax(-1).numpy()

    def _embed_prompts(self, prompts: Sequence[str | Sequence[str]]) -> np.ndarray:
        """One unit-norm vector a class: the mean over its prompts' embeddings, normalised again."""
        groups = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        if not all(groups):
            raise UserError("give at least one prompt for every class")
        every = self.embed_texts([prompt for group in groups for prompt in group])
        bounds = np.cumsum([0, *map(len, groups)])
        means = np.stack([every[a:b].mean(0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, mask = self.tokenizer.encode_texts(texts)
        return torch.from_numpy(tokens).to(self.device), torch.from_numpy(mask).to(self.device)

    def _stacked(self, parts: list[Tensor]) -> np.ndarray:
        if not parts:
            return np.zeros((0, self.config["embed_dim"]), np.float32)
        return torch.cat(parts).float().cpu().numpy()

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        if cut := sum(length > self.tokenizer.room for length in self.tokenizer.lengths(texts)):
            logger.warning(
                "%d of %d texts are longer than the context of %d tokens and were cut; long='chunks' reads them whole",
                cut,
                len(texts),
                self.tokenizer.context_length,
            )


def several(images: Iterable[Any]) -> list[Any]:
    """The images as a list; UserError for a single one, which would be taken apart into characters or rows."""
    one = isinstance(images, str | bytes | Path | Image.Image)
    if one or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise UserError("give a list of images (or an array [n, h, w, 3]); for a single image write [image]")
    return list(images)


def at_least_one(images: Iterable[Any]) -> list[Any]:
    """As `several`; UserError where there is none."""
    images = several(images)
    if not images:
        raise UserError("no images: give at least one")
    return images
