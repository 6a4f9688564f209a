"""The model with its tokenizer and preprocessing: what users call."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bvl.convert.torch_format.source.embedding import Embedder, at_least_one, predicts, several
from bvl.convert.torch_format.source.errors import UserError, logger
from bvl.convert.torch_format.source.layers import sigmoid
from bvl.convert.torch_format.source.locating import (
    Detections,
    Grounded,
    detect_objects,
    judge_presence,
    locate,
    phrase_lists,
    smooth,
)
from bvl.convert.torch_format.source.prompts import region_lists
from bvl.convert.torch_format.source.search import SearchOptions
from bvl.convert.torch_format.source.text import read_mark
from bvl.convert.torch_format.source.writing import Candidate, caption_images, describe_regions

WEIGHTS, CALIBRATION = "model.safetensors", "calibration.json"


class Model(Embedder):
    """A trained model, for predictions and for fine-tuning (see Network).

    images are paths, bytes, PIL images or arrays ([h, w], [h, w, 3], or stacked [n, h, w, 3]). Coordinates are fractions
    of the original image, whatever was padded or resized. `heads`: parameters of the training tasks' own heads, by name;
    no method here reads them.
    Raises UserError for arguments that cannot be used, and for what the model was not trained for.
    """

    def save(self, folder: str | Path) -> None:
        """Write the model as it is now, such as after fine-tuning, into a folder that `load` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "preprocess.json", "bvl_model.py"):
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copy(self.folder / name, folder / name)
        tensors = self.state_dict() | {f"heads.{name}": value for name, value in self.heads.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)

    @predicts
    def caption(
        self,
        images: Iterable[Any],
        *,
        guidance: float | Sequence[float] = 1.0,
        guidance_null: str = "image",
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
        **search: Any,
    ) -> list[str]:
        """One text for each image.

        guidance: classifier-free guidance, one scale or one an image; 1 is plain decoding, 2 makes captions more
          specific, 0 does not look at the image (Kornblith et al. 2023, arXiv:2307.16686).
        guidance_null: what the other side of guidance goes without: the "image", the "controls" or "both".
        language_model: another captioner with the same vocabulary, whose texts without an image are that other side.
        length (words), section, quality (bin), prompt: the controls that the model was trained with, one value or one
          an image. begin: the first words of the captions.
        best_of: of so many candidates (samples, or the best of the beams) the one most like the image to `scorer`, a
          contrastive model; None = this model.
        first_row: number of the first image, or one number an image; samples depend on `seed` and these alone.
        search: beams, groups, diversity, length_penalty, temperature, top_k, top_p, no_repeat_ngram,
          repetition_penalty, min_length, max_length; see SearchOptions.
        """
        self.need_task("caption")
        images = several(images)
        if not images:
            raise UserError("no images to caption: give at least one")
        if scorer is not None and best_of == 1:
            raise UserError(
                "scorer chooses among candidates, and best_of=1 writes only one: set best_of, such as 8"
            )
        judge = self if scorer is None else as_model(scorer)
        if best_of > 1 and not judge.config["tasks"]["contrastive"]:
            raise UserError(f"best_of={best_of} needs a contrastive model to choose: name one as scorer")
        options = self._search_options("caption", num_return=best_of, **search)
        candidates = caption_images(
            self,
            images,
            options=options,
            guidance=guidance,
            guidance_null=guidance_null,
            language_model=self._other(language_model, options),
            controls={"section": section, "length": length, "quality": quality, "prompt": prompt},
            begin=begin,
            seed=seed,
            first_row=first_row,
            batch_size=batch_size,
        )
        if best_of == 1:
            return [row[0].text for row in candidates]
        return judge.most_alike(images, candidates, batch_size)

    @predicts
    def describe(
        self,
        images: Iterable[Any],
        *,
        boxes: Sequence[Any] | None = None,
        points: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        regions: Sequence[Any] | None = None,
        length: int | Sequence[Any] | None = None,
        guidance: float | Sequence[Any] = 1.0,
        guidance_null: str = "both",
        language_model: Model | str | Path | None = None,
        begin: str | Sequence[Any] | None = None,
        seed: int = 0,
        first_row: int | Sequence[Any] = 0,
        batch_size: int = 32,
        image_batch_size: int = 16,
        **search: Any,
    ) -> list[list[str]]:
        """One text for each region of each image; an image is encoded once, however many regions it has.

        boxes [[[x0, y0, x1, y1], ...], ...], points [[[x, y], ...], ...], masks (boolean arrays of the image's size): one
          of them is given, as a list for each image; regions: a mix, {"box": ...}, {"point": ...} and {"mask": ...}.
        length (words), guidance, begin: one value, or one a region, in lists like those of the regions.
        guidance_null: what the other side of guidance goes without: the "image", the "region" or "both".
        The rest is as in `caption`.
        """
        self.need_task("describe")
        images = several(images)
        if chosen := {"best_of", "scorer"} & search.keys():
            raise UserError(f"{min(chosen)}: texts of regions are not chosen among candidates; leave it out")
        lists = region_lists(len(images), boxes=boxes, points=points, masks=masks, regions=regions)
        options = self._search_options("describe", **search)
        described = describe_regions(
            self,
            images,
            lists,
            options=options,
            guidance=guidance,
            guidance_null=guidance_null,
            language_model=self._other(language_model, options),
            length=length,
            begin=begin,
            seed=seed,
            first_row=first_row,
            batch_size=batch_size,
            image_batch_size=image_batch_size,
        )
        return [[candidates[0].text for candidates in some] for some in described]

    @predicts
    def ground(
        self, images: Iterable[Any], phrases: Any, *, alpha: float = 0.1, batch_size: int = 16
    ) -> list[Grounded]:
        """For each image the box of each phrase, and whether it is there at all.

        phrases: the same for all images, or a list for each. alpha: the share of absent phrases that may pass for found.
        """
        if not self.need_task("ground")["boxes"]:
            raise UserError("this model was trained without boxes of phrases; find masks by `segment`")
        if not 0 < alpha < 1:
            raise UserError(f"alpha={alpha}: the share of absent phrases that may be found must lie in 0..1")
        found = locate(self, at_least_one(images), phrases, batch_size)
        return [Grounded(one.boxes, *judge_presence(one.presence, self.negatives, alpha)) for one in found]

    @predicts
    def segment(self, images: Iterable[Any], phrases: Any, *, batch_size: int = 16) -> list[np.ndarray]:
        """For each image and phrase the probability [k, h, w] of every pixel to belong to what it names."""
        if not self.need_task("ground")["masks"]:
            raise UserError("this model was trained without masks of phrases")
        return [
            sigmoid(one.shown.to_original_pixels(one.mask_logits, outside=-np.inf))
            for one in locate(self, at_least_one(images), phrases, batch_size)
        ]

    @predicts
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
        """For each image the objects that go by one of `names`, any texts, best first.

        threshold: least score. iou_threshold: of two boxes of one name that overlap more the better one stays.
        """
        self.need_task("detect")
        if isinstance(names, str):
            raise UserError("names is one text; give a list of names")
        (names,) = phrase_lists(self, names, 1)
        # A mark is for phrases that the text decoder reads.
        names = list(dict.fromkeys(read_mark(name)[0] for name in names))
        found = detect_objects(
            self,
            at_least_one(images),
            names,
            threshold=threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            batch_size=batch_size,
        )
        return list(found)

    @predicts
    def heat_maps(
        self,
        images: Iterable[Any],
        phrases: Any,
        *,
        against: Any | None = None,
        sigma: float = 0.5,
        batch_size: int = 16,
    ) -> list[np.ndarray]:
        """For each image and phrase the likeness [k, h, w] of every pixel's patch to it, by a model without boxes.

        Cosines, NaN where preprocessing cut the original off. against: for each phrase another, whose likeness is taken
        off. sigma: of the Gaussian that smooths them, in patches (BioViL: Boecking et al. 2022, arXiv:2204.09817).
        """
        self.need_task("heat_maps")
        if sigma < 0:
            raise UserError(f"sigma={sigma}: must not be negative")
        images = at_least_one(images)
        lists = phrase_lists(self, phrases, len(images))
        others = [[]] * len(images) if against is None else phrase_lists(self, against, len(images))
        if against is not None and any(len(a) != len(b) for a, b in zip(lists, others, strict=True)):
            raise UserError("against: give one phrase for each of the phrases")
        distinct = list(dict.fromkeys(read_mark(p)[0] for row in (*lists, *others) for p in row))
        embeddings = dict(zip(distinct, self.embed_texts(distinct), strict=True))
        out = []
        for start in range(0, len(images), batch_size):
            shown, features = self.features(images[start : start + batch_size], patch_embed=True)
            for one, patches in zip(shown, features.patch_embed.cpu().numpy(), strict=True):
                text = np.stack([embeddings[read_mark(phrase)[0]] for phrase in lists[len(out)]])
                if against is not None:
                    text = text - np.stack([embeddings[read_mark(p)[0]] for p in others[len(out)]])
                cosines = (text @ patches.T).reshape(len(text), *features.grid)
                out.append(one.to_original_pixels(smooth(cosines, sigma), outside=np.nan))
        return out

    def need_task(self, name: str) -> dict[str, Any]:
        """What the model knows of a task: caption, describe, ground, detect, heat_maps; UserError if it was not trained."""
        task = self.config["tasks"][name]
        if not task:
            trained = ", ".join(other for other, value in self.config["tasks"].items() if value)
            raise UserError(f"this model was not trained to {name}; its tasks are: {trained or 'none'}")
        return task

    def most_alike(self, images: list[Any], candidates: list[list[Candidate]], batch_size: int) -> list[str]:
        """For each image the candidate most like it by the cosine of the embeddings; the first of equal ones."""
        texts = [candidate.text for row in candidates for candidate in row]
        embed, start, chosen = self.embed_texts(texts, batch_size=batch_size), 0, []
        for image, row in zip(self.embed_images(images, batch_size=batch_size), candidates, strict=True):
            chosen.append(row[int((embed[start : start + len(row)] @ image).argmax())].text)
            start += len(row)
        return chosen

    def _search_options(self, task: str, max_length: int | None = None, **search: Any) -> SearchOptions:
        longest = self.config["tasks"][task]["max_length"]
        if max_length is not None and max_length > longest:
            raise UserError(
                f"max_length={max_length}: this model was trained on texts of up to {longest} tokens"
            )
        return SearchOptions(max_length=longest if max_length is None else max_length, **search)

    def _other(self, language_model: Model | str | Path | None, options: SearchOptions) -> Model | None:
        """The language model of guidance, checked."""
        if language_model is None:
            return None
        other = as_model(language_model)
        longest = other.need_task("caption")["max_length"]
        if not self.tokenizer.same_vocabulary(other.tokenizer):
            raise UserError("the language model reads another vocabulary than the captioner")
        if options.max_length > longest:
            raise UserError(
                f"max_length={options.max_length}: the language model was trained on texts of up to {longest} tokens"
            )
        return other


def as_model(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load(model)


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """The model of a folder that `m.export(folder, format="torch")` or `Model.save` wrote.

    dtype: of parameters and computation. Raises UserError for a folder that holds no such model.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS, "tokenizer.json", "preprocess.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; give the folder that was exported")
    model = Model(json.loads((folder / "config.json").read_text()), folder)
    tensors = load_file(folder / WEIGHTS)
    model.heads = {
        name.removeprefix("heads."): tensors.pop(name)
        for name in sorted(tensors)
        if name.startswith("heads.")
    }
    model.load_state_dict(tensors, strict=True)
    if (folder / CALIBRATION).is_file():
        calibration = json.loads((folder / CALIBRATION).read_text())
        if calibration["weights_sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest():
            model.negatives = calibration["negatives"]
        else:
            logger.warning("%s is of other weights than these, so it is not used", folder / CALIBRATION)
    return model.to(device=device, dtype=dtype).eval()
