"""A loaded model as a Python object: `bvl.load("runs/x")`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from bvl.config import Config
from bvl.data.long_texts import LongTexts, warn_of_cuts
from bvl.errors import UserError
from bvl.evals.base import evaluate
from bvl.evals.folder import suites_for
from bvl.runs import Components, load_components
from bvl.tasks import contrastive

FOREIGN = ("open_clip:", "hf:")

ClassPrompts = str | Sequence[str] | Mapping[str, str | Sequence[str]]


class Model:
    """A trained model with its tokenizer and preprocessing.

    params: the parameters, {"model": ..., "heads": {task: ...}}. config: the run's Config.
    """

    def __init__(self, components: Components):
        self.components = components

    @property
    def params(self) -> Any:
        return self.components.params

    @property
    def config(self) -> Config:
        return self.components.config

    def __repr__(self) -> str:
        return f"Model(step={self.components.step}, weights={self.components.weights_hash()})"

    def embed_images(self, images: Iterable[Any], *, batch_size: int = 64) -> Float[np.ndarray, "n d"]:
        """Unit-norm embeddings of images: paths, PIL images or arrays ([h, w], [h, w, 3], or stacked [n, h, w, 3]).

        Raises UserError for one image instead of several, and ImageError for one that cannot be read.
        """
        return contrastive.embed_images(self.components, _several(images), batch_size=batch_size)

    def embed_texts(
        self, texts: Iterable[str], *, long: LongTexts = "cut", batch_size: int = 64
    ) -> Float[np.ndarray, "n d"]:
        """Unit-norm embeddings of texts.

        long: "cut" drops what exceeds the context length, as in training, and logs how many texts that befell;
        "chunks" reads long texts whole, in pieces of complete sentences, and gives the mean of the pieces'
        embeddings weighted by their numbers of tokens, normalised again.
        Raises UserError for one text instead of several, and for another `long`.
        """
        if isinstance(texts, str):
            raise UserError(f"embed_texts takes a list of texts; for one write [{_short(texts)}]")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"embed_texts takes strings, not {type(text).__name__}")
        if long == "cut":
            warn_of_cuts(texts, self.components.tokenizer, option="long='chunks'")
        return contrastive.embed_texts(self.components, texts, long=long, batch_size=batch_size)

    def classify(
        self,
        images: Iterable[Any],
        prompts: Sequence[ClassPrompts] | Mapping[str, ClassPrompts],
        multi_label: bool = False,
        *,
        batch_size: int = 64,
    ) -> Float[np.ndarray, "n c"]:
        """Zero-shot class probabilities; columns are the classes in the order of `prompts`.

        prompts: one text a class, or several (their embeddings are averaged), as a list or as a dict class -> texts.
        multi_label: each class on its own. Where every class is {"positive": texts, "negative": texts}, that is the
        softmax of the two; else sigmoid(scale * cosine + bias), which is calibrated only for a model trained with
        the sigmoid loss.
        Raises UserError for prompts that are not so.
        """
        given = prompts.values() if isinstance(prompts, Mapping) else prompts
        if isinstance(prompts, str):
            raise UserError("classify takes a list of prompts, one a class, or a dict class -> prompts")
        pairs = [isinstance(prompt, Mapping) for prompt in given]
        if any(pairs):
            if not multi_label or not all(pairs):
                raise UserError(
                    "positive and negative prompts need multi_label=True, and then every class must have both"
                )
            classes = [_pair(prompt) for prompt in given]
        else:
            classes = [_texts(prompt) for prompt in given]
        if not classes or (len(classes) < 2 and not multi_label):
            raise UserError(f"{len(classes)} classes given; choosing one needs at least two")
        return contrastive.classify(
            self.components, _several(images), classes, multi_label=multi_label, batch_size=batch_size
        )

    def evaluate(
        self,
        folder: str | Path,
        *,
        split: str | None = None,
        name: str | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        texts_per_image: int | None = 1,
        long_texts: LongTexts = "cut",
        batch_size: int = 256,
    ) -> dict[str, Any]:
        """Retrieval and zero-shot metrics on a folder of records, as `bvl eval` gives them; nothing is written.

        "<suite>/<metric>" -> value, "<suite>/<metric>/ci95" -> [low, high], "<suite>/provenance" -> what they depend on.
        The options are those of `bvl eval`; texts_per_image=None reads all texts of a record.
        """
        suites = suites_for(
            folder,
            split=split,
            name=name,
            config=self.config,
            image_column=image_column,
            text_column=text_column,
            texts_per_image=texts_per_image,
            long_texts=long_texts,
        )
        return evaluate(self.components, suites, batch_size=batch_size).flat()


def load(spec: str | Path, *, checkpoint: str | int = "latest") -> Model:
    """Load a run folder; nothing outside of it is needed.

    checkpoint: "latest", "best" (by the config's checkpoint.best) or a step.
    Raises UserError (RunFolderError, CheckpointError) for what cannot be loaded.
    """
    if str(spec).startswith(FOREIGN):
        raise UserError(
            f"{spec}: this version of bvl reads run folders only, not open_clip or Hugging Face weights yet; "
            f"give the folder of a bvl run"
        )
    return Model(load_components(spec, checkpoint=checkpoint))


def _several(images: Iterable[Any]) -> Iterable[Any]:
    """The images, unless it is a single one, which would be taken apart into characters or rows."""
    one = isinstance(images, str | bytes | Path | Image.Image)
    if one or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise UserError("give a list of images (or an array [n, h, w, 3]); for a single image write [image]")
    return images


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prompts of a class are a text or several texts, not {_short(prompt)}")
    return texts


def _pair(prompt: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    if set(prompt) != {"positive", "negative"}:
        raise UserError(f"a class has 'positive' and 'negative' prompts, not {', '.join(map(str, prompt))}")
    return _texts(prompt["positive"]), _texts(prompt["negative"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
