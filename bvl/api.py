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
from bvl.evals.writing import best_captions, decode_options, own_scorer
from bvl.runs import Components, load_components
from bvl.tasks import contrastive
from bvl.tasks.captioning import GuidanceNull, captioning_task_of

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

    def caption(
        self,
        images: Iterable[Any],
        *,
        guidance: float | Sequence[float] = 1.0,
        guidance_null: GuidanceNull = "image",
        language_model: Model | str | Path | None = None,
        beams: int = 1,
        groups: int = 1,
        diversity: float = 0.5,
        length_penalty: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        no_repeat_ngram: int = 0,
        repetition_penalty: float = 1.0,
        min_length: int = 0,
        max_length: int | None = None,
        length: int | Sequence[int] | None = None,
        section: str | Sequence[str] | None = None,
        quality: int | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        begin: str | Sequence[str] | None = None,
        best_of: int = 1,
        scorer: Model | str | Path | None = None,
        seed: int = 0,
        first_row: int | Sequence[int] = 0,
        batch_size: int = 16,
    ) -> list[str]:
        """One text for each image: paths, PIL images or arrays.

        guidance: classifier-free guidance, one scale or one an image; 1 is plain decoding, 2 makes captions more
          specific, 0 does not look at the image (Kornblith et al. 2023, arXiv:2307.16686).
        guidance_null: what the other side of guidance goes without: the "image", the "controls" or "both".
        language_model: another captioner with the same vocabulary, whose texts without an image are that other side.
        beams, groups, diversity, length_penalty: beam search and diverse beam search. temperature above 0: sampling,
          of the top_k most likely tokens and the nucleus top_p, from `seed`. no_repeat_ngram, repetition_penalty,
          min_length and max_length (tokens; None = the longest of the training): see bvl/decode/options.py.
        length (words), section, quality (bin), prompt: the controls that the run was trained with, one value or one
          an image; None leaves a control out. begin: the first words of the captions.
        best_of: of so many candidates (samples, or the best of the beams) the one most like the image to `scorer`, a
          contrastive model; None = this model.
        first_row: for images that are captioned in several calls: the number of the first one among all, or one
          number an image. Samples depend on `seed` and these numbers alone.
        batch_size: so many images are decoded at a time, always: fewer are filled up to it, so that one program is
          compiled for any number. For single images at low latency set 1.
        Raises UserError for what cannot be used, and ConfigError, with the missing task named, for a run without
        captions.
        """
        images = list(_several(images))
        captioning_task_of(self.config)
        if scorer is not None and best_of == 1:
            raise UserError(
                "scorer chooses among candidates, and best_of=1 writes only one: set best_of, such as 8"
            )
        search = {
            "beams": beams,
            "groups": groups,
            "diversity": diversity,
            "length_penalty": length_penalty,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "no_repeat_ngram": no_repeat_ngram,
            "repetition_penalty": repetition_penalty,
            "min_length": min_length,
        }
        other = None if language_model is None else _components(language_model)
        judge = own_scorer(self.components) if scorer is None else _components(scorer)
        return best_captions(
            self.components,
            images,
            options=decode_options(self.config, best_of=best_of, max_length=max_length, **search),
            scorer=judge,
            batch_size=batch_size,
            guidance=guidance,
            guidance_null=guidance_null,
            language_model=other,
            controls={"section": section, "length": length, "quality": quality, "prompt": prompt},
            begin=begin,
            seed=seed,
            first_row=first_row,
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
        captions: Mapping[str, Any] | None = None,
        batch_size: int = 256,
    ) -> dict[str, Any]:
        """Retrieval, zero-shot and caption metrics on a folder of records, as `bvl eval` gives them; nothing is written.

        "<suite>/<metric>" -> value, "<suite>/<metric>/ci95" -> [low, high], "<suite>/provenance" -> what they depend on.
        The options are those of `bvl eval`; texts_per_image=None reads all texts of a record, and captions are fields of
        the suite `bvl.evals.caption.Captions`, such as {"guidance": 2.0}.
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
            captions=captions,
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


def _components(model: Model | str | Path) -> Components:
    return model.components if isinstance(model, Model) else load(model).components


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
