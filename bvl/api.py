"""A loaded model as a Python object: `bvl.load("runs/x")`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from jaxtyping import Float
from PIL import Image

from bvl.config import Config
from bvl.conversion import Format, export
from bvl.convert.parity import TOLERANCE, Tolerance
from bvl.convert.report import Report
from bvl.data.long_texts import LongTexts, warn_of_cuts
from bvl.data.region_prompts import BoxesLike, MasksLike, PointsLike, RegionsLike, check_boxes, check_points
from bvl.errors import ConversionError, UserError
from bvl.evals.base import evaluate
from bvl.evals.folder import suites_for
from bvl.evals.writing import best_captions, decode_options, own_scorer
from bvl.runs import Components, RunFolder, load_components
from bvl.tasks import contrastive, describing, locating
from bvl.tasks.captioning import GuidanceNull, captioning_task_of
from bvl.tasks.describing import RegionNull
from bvl.tasks.locating import Detections, Grounded

# The same for all images, or a list for each.
Phrases = Sequence[str] | Sequence[Sequence[str]]
ClassPrompts = str | Sequence[str] | Mapping[str, str | Sequence[str]]


class Search(TypedDict, total=False):
    """How texts are searched for, by `caption` and `describe` alike; bvl/decode/options.py has more on each.

    beams=1 (greedy), groups=1, diversity=0.5, length_penalty=1.0: beam search and diverse beam search.
    temperature=0.0: above 0 samples, of the top_k=0 most likely tokens (0 = all) and the nucleus top_p=1.0.
    no_repeat_ngram=0, repetition_penalty=1.0, min_length=0 and max_length=None (tokens; None = the longest of the
    training).
    """

    beams: int
    groups: int
    diversity: float
    length_penalty: float
    temperature: float
    top_k: int
    top_p: float
    no_repeat_ngram: int
    repetition_penalty: float
    min_length: int
    max_length: int | None


class Model:
    """A trained model with its tokenizer and preprocessing.

    params: the parameters, {"model": ..., "heads": {task: ...}}. config: the run's Config.
    """

    def __init__(self, components: Components, source: str = "model"):
        self.components = components
        self.source = source

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
        **search: Unpack[Search],
    ) -> list[str]:
        """One text for each image: paths, PIL images or arrays.

        guidance: classifier-free guidance, one scale or one an image; 1 is plain decoding, 2 makes captions more
          specific, 0 does not look at the image (Kornblith et al. 2023, arXiv:2307.16686).
        guidance_null: what the other side of guidance goes without: the "image", the "controls" or "both".
        language_model: another captioner with the same vocabulary, whose texts without an image are that other side.
        search: beams, temperature and so on, see `Search`.
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
        other = None if language_model is None else _components(language_model)
        judge = own_scorer(self.components) if scorer is None else _components(scorer)
        return best_captions(
            self.components,
            images,
            options=decode_options(self.config, best_of=best_of, **search),
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

    def describe(
        self,
        images: Iterable[Any],
        *,
        boxes: Sequence[BoxesLike] | None = None,
        points: Sequence[PointsLike] | None = None,
        masks: Sequence[MasksLike] | None = None,
        regions: Sequence[RegionsLike] | None = None,
        length: int | Sequence[Any] | None = None,
        guidance: float | Sequence[Any] = 1.0,
        guidance_null: RegionNull = "both",
        language_model: Model | str | Path | None = None,
        begin: str | Sequence[Any] | None = None,
        seed: int = 0,
        first_row: int | Sequence[Any] = 0,
        batch_size: int = 32,
        image_batch_size: int = 16,
        **search: Unpack[Search],
    ) -> list[list[str]]:
        """One text for each region of each image; an image is encoded once, however many regions it has.

        boxes, points, masks: one of them is given, as a list for each image: boxes [[[x0, y0, x1, y1], ...], ...] and
          points [[[x, y], ...], ...] in fractions of the image, masks as boolean arrays of the image's size. An image
          without regions has an empty list. regions: a mix of them, {"box": ...}, {"point": ...} and {"mask": ...}.
        length (words), guidance, begin: one value, or one a region, in lists like those of the regions. length is a
          control, for runs trained with data.controls.lengths.
        guidance_null: what the other side of guidance goes without: the "image", the "region" or "both".
        search, language_model, seed: as in `caption`. first_row: number of the first region, or one number a region.
        batch_size: so many regions are decoded at a time, image_batch_size: so many images encoded.
        Raises UserError for what cannot be used, and ConfigError, with the missing task named, for a run that does not
        describe regions.
        """
        images = list(_several(images))
        describing.describing_task_of(self.config)
        if chosen := {"best_of", "scorer"} & search.keys():
            raise UserError(
                f"{min(chosen)}: texts of regions are not chosen among candidates, for a scorer compares texts with whole "
                "images; leave it out, or search with beams"
            )
        described = describing.describe(
            self.components,
            images,
            _region_lists(boxes=boxes, points=points, masks=masks, regions=regions),
            options=decode_options(self.config, of_regions=True, **search),
            guidance=guidance,
            guidance_null=guidance_null,
            language_model=None if language_model is None else _components(language_model),
            controls={"length": length},
            begin=begin,
            seed=seed,
            first_row=first_row,
            batch_size=batch_size,
            image_batch_size=image_batch_size,
        )
        return [[candidates[0].text for candidates in of_image] for of_image in described]

    def ground(
        self, images: Iterable[Any], phrases: Phrases, *, alpha: float = 0.1, batch_size: int = 16
    ) -> list[Grounded]:
        """For each image the box of each phrase (fractions of the image), and whether it is there at all.

        phrases: the same for all images, or a list for each.
        alpha: the share of absent phrases that may pass for found: `found` is p_values <= alpha, by the scores of
          absent phrases that the run keeps in calibration.json; without it p_values are NaN, and found is scores >= 0.5.
          So it is, with a warning, where they are fewer than ceil(1 / alpha) - 1, too few for so small a p-value.
        Raises UserError for an empty phrase or one beyond the context, and ConfigError, with the missing task named,
        for a run without grounding, or whose grounding was trained without boxes.
        """
        return locating.ground(self.components, _several(images), phrases, alpha=alpha, batch_size=batch_size)

    def segment(
        self, images: Iterable[Any], phrases: Phrases, *, batch_size: int = 16
    ) -> list[Float[np.ndarray, "k h w"]]:
        """For each image and phrase the probability of every pixel of the original to belong to what it names.

        Whether that is there at all, `ground` says. phrases and errors as there, but for ConfigError for a run whose
        grounding was trained without masks.
        """
        return locating.segment(self.components, _several(images), phrases, batch_size=batch_size)

    def detect(
        self,
        images: Iterable[Any],
        names: Sequence[str],
        *,
        threshold: float = 0.3,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        batch_size: int = 16,
    ) -> list[Detections]:
        """For each image the objects that go by one of `names`, any texts, best first; boxes in fractions of the image.

        threshold: least score. iou_threshold: of two boxes of one name that overlap more the better one stays.
        A name that is given twice counts once. Raises UserError for names that cannot be used, and ConfigError, with the missing task named, for a run without
        detection.
        """
        return locating.detect(
            self.components,
            _several(images),
            names,
            threshold=threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            batch_size=batch_size,
        )

    def heat_maps(
        self,
        images: Iterable[Any],
        phrases: Phrases,
        *,
        against: Phrases | None = None,
        sigma: float = 0.5,
        batch_size: int = 16,
    ) -> list[Float[np.ndarray, "k h w"]]:
        """For each image and phrase the likeness of every pixel's patch to it, by a model trained without boxes.

        Cosines, NaN where preprocessing cut the original off. against: for each phrase another, such as "without a nodule"
        for "with a nodule", whose likeness is taken off. sigma: of the Gaussian that smooths them, in patches.
        Raises UserError for phrases that cannot be used, and ConfigError for a run without a contrastive task.
        """
        return locating.heat_maps(
            self.components, _several(images), phrases, against=against, sigma=sigma, batch_size=batch_size
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

    def export(
        self,
        folder: str | Path,
        format: Format,
        *,
        check: bool = True,
        tolerance: Tolerance = TOLERANCE,
        hub_id: str | None = None,
        raises: bool = True,
    ) -> Report:
        """Write the model for colleagues who use PyTorch, and compare what their library makes of it with this one.

        format: "open_clip" or "hf" (a folder that `create_model("local-dir:...")` or `from_pretrained` loads), or
        "torch" (any model, with one file of plain PyTorch that has these same methods). Tokenizer, preprocessing,
        model card and parity.json go with it.
        hub_id: of a BERT text tower for open_clip, the public name of a model with the same config.
        Raises ConversionError where the format cannot hold the model, naming the option, and, unless `raises` is
        False, where the comparison fails.
        """
        report = export(
            self.components,
            Path(folder),
            format,
            model=self,
            source=self.source,
            check=check,
            tolerance=tolerance,
            hub_id=hub_id,
            run=RunFolder(self.source),
        )
        if check and raises and not report.passed:
            raise ConversionError(
                f"{report.lines()[-1]}; the folder is {folder}, details are in its parity.json"
            )
        return report


def load(spec: str | Path, *, checkpoint: str | int = "latest") -> Model:
    """Load a run folder, or the folder of another library: "open_clip:DIR", "hf:DIR", "hf-hub:NAME".

    Nothing outside of the folder is needed. A model of another library is not compared with its source here;
    `bvl convert` does that.
    checkpoint: of a run folder, "latest", "best" (by the config's checkpoint.best) or a step.
    Raises UserError (RunFolderError, CheckpointError, ConversionError) for what cannot be loaded.
    """
    return Model(load_components(spec, checkpoint=checkpoint), str(spec))


def _components(model: Model | str | Path) -> Components:
    return model.components if isinstance(model, Model) else load(model).components


def _several(images: Iterable[Any]) -> Iterable[Any]:
    """The images, unless it is a single one, which would be taken apart into characters or rows."""
    one = isinstance(images, str | bytes | Path | Image.Image)
    if one or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise UserError("give a list of images (or an array [n, h, w, 3]); for a single image write [image]")
    return images


def _region_lists(**given: Any) -> list[list[Any]]:
    """The one of boxes, points, masks and regions that is given, as regions of each image."""
    used = [name for name, value in given.items() if value is not None]
    if len(used) != 1:
        raise UserError(
            f"give one of boxes, points, masks and regions, as a list for each image, not {' and '.join(used) or 'none'}"
        )
    (name,) = used
    lists = given[name]
    if name == "regions":
        return lists
    check = {"boxes": check_boxes, "points": check_points}.get(name)
    out = []
    for i, some in enumerate(lists):
        if check is not None and len(some):
            # Before anything is encoded, and by the name of the argument.
            check(some, f"images[{i}]")
        out.append([{{"boxes": "box", "points": "point", "masks": "mask"}[name]: value} for value in some])
    return out


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
