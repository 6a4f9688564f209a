"""Captions of images against references, a contrastive model's eyes, findings that are known, and lengths asked for."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bvl.config import Config, content_hash
from bvl.data.controls import OPTIONS
from bvl.data.phantoms import FINDING_LEXICON
from bvl.data.sources import RecordSet, Source
from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.base import (
    Cache,
    Collector,
    EvalResult,
    Suite,
    describe,
    encode_records,
    fields_of,
    load_pixels,
    provenance,
    with_images,
)
from bvl.evals.caption_scores import (
    FINDING_RULES,
    Embeddings,
    Scores,
    Truth,
    alignment_scores,
    length_scores,
    stated_findings,
    text_scores,
)
from bvl.evals.writing import best_captions, check_can_choose, decode_options, own_scorer
from bvl.metrics.caption_text import num_words
from bvl.metrics.labeller import Lexicon, label_text
from bvl.metrics.lexicon import CHEST_LEXICON
from bvl.runs import Components, load_components
from bvl.tasks.caption import Caption
from bvl.tasks.captioning import (
    GuidanceNull,
    ImageTokens,
    captioning_task_of,
    check_scorer,
    encode_for_captions,
    longest_text,
)
from bvl.tasks.contrastive import embed_texts, has_contrastive


@dataclasses.dataclass(frozen=True)
class CaptionItem:
    """An image to caption: one of the records that show it, its references, and the prompt it comes with."""

    index: int
    references: tuple[str, ...]
    prompt: str | None = None


@dataclasses.dataclass
class Prepared:
    """What captions of one model are judged against, whatever they were decoded with.

    tokens: the pixels encoded, where they are captioned more than once.
    """

    items: list[CaptionItem]
    pixels: list[np.ndarray]
    scorer: Components | None
    embeddings: Embeddings | None
    truths: list[Truth] | None
    left_out: dict[str, int]
    unreadable: list[dict[str, str]]
    tokens: ImageTokens | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions(Suite):
    """Captions written by the run, one an image, against the image's references.

    cider_d, bleu1..4, rouge_l compare words with the references (bvl/metrics/caption_text.py tokenizes); clipscore,
    ref_clipscore, self_retrieval_r1 (among 500 images) and bag_r1 (among 10 look-alikes) ask a contrastive model;
    finding_precision, finding_recall, finding_f1, invented_rate and wrong_negation_rate compare findings that are
    stated with those that are true (bvl/metrics/findings.py); length_within_1 and length_error compare lengths with those asked for; mean_length (words), distinct1,
    distinct2 and unique tell how varied the captions are.

    task: the run's captioning task. text: the field or fields whose texts are references, None = the source's; all of a
      record's count. Records with the same image path (and prompt) are one image with several references.
    max_images: so many images, drawn by `seed`; None = all. The seed is also that of sampling and of pools.
    guidance, guidance_null, language_model (a run folder): see `write_captions`. beams to max_length: see
      `DecodeOptions`; max_length=None is the longest text of the training. decode_batch_size: images at a time.
    length: words to ask for: a number, several that take turns over the images, or "reference", as many as the image's
      first reference has; None = nothing. section, quality: likewise controls, one value for all. A run that was
      trained with a prompt gets the record's.
    best_of: of so many candidates the one that the scorer finds most like the image.
    scorer: run folder of a contrastive model; None = the run itself where it has a Contrastive task, and then the
      judge is no stranger, which "scorer" in the provenance says. Without any, its metrics are absent.
    lexicon: findings as the phantoms' facts have them ("phantoms"), those that references of chest radiographs state
      ("chest"), or none.
    """

    source: Source
    task: str = "caption"
    text: str | dict[str, float] | None = None
    max_images: int | None = 500
    seed: int = 0
    guidance: float = 1.0
    guidance_null: GuidanceNull = "image"
    language_model: str | None = None
    beams: int = 1
    groups: int = 1
    diversity: float = 0.5
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    min_length: int = 0
    max_length: int | None = None
    length: int | tuple[int, ...] | Literal["reference"] | None = None
    section: str | None = None
    quality: int | None = None
    best_of: int = 1
    scorer: str | None = None
    lexicon: Literal["none", "phantoms", "chest"] = "none"
    decode_batch_size: int = 64

    def __post_init__(self):
        if self.max_images is not None and self.max_images < 2:
            raise ConfigError(f"max_images={self.max_images}: captions are compared over at least 2 images")
        if self.decode_batch_size < 1:
            raise ConfigError(f"decode_batch_size={self.decode_batch_size}: must be at least 1")
        if not (np.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance={self.guidance}: must be a finite number of at least 0")
        asked = self.length if isinstance(self.length, tuple | list) else (self.length,)
        if not asked or any(isinstance(n, int) and n < 1 for n in asked):
            raise ConfigError(f"length={self.length}: ask for at least 1 word")
        if self.guidance_null not in ("image", "controls", "both"):
            raise ConfigError(f"guidance_null={self.guidance_null!r}: choose image, controls or both")
        if self.lexicon not in ("none", "phantoms", "chest"):
            raise ConfigError(f"lexicon={self.lexicon!r}: choose none, phantoms or chest")
        self.source.choice(self.text)

    def with_guidance(self, guidance: float) -> Captions:
        """This suite at another scale, with the records, scorer and language model that it has read."""
        other = dataclasses.replace(self, guidance=guidance)
        read = {"_opened", "_references", "_scorer", "_scorer_cache", "_language_model"}
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in read})
        return other

    def check_config(self, config: Config) -> None:
        """Raise ConfigError for a run that cannot write what the suite asks for."""
        captioning_task_of(config)
        if not isinstance(config.tasks.get(self.task), Caption):
            raise ConfigError(
                f"task={self.task!r} does not write captions; tasks are {', '.join(config.tasks)}"
            )
        controls = config.data.controls
        for name in ("section", "length", "quality"):
            if getattr(self, name) is not None and name not in controls.enabled:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is asked for, but the run is trained without it; set "
                    f"data.controls.{OPTIONS[name]}"
                )
        if self.section is not None and self.section not in controls.sections:
            raise ConfigError(f"section={self.section!r}: the run knows {', '.join(controls.sections)}")
        if self.quality is not None and not 0 <= self.quality < controls.quality:
            raise ConfigError(f"quality={self.quality}: the run knows bins from 0 to {controls.quality - 1}")
        asked = self.length if isinstance(self.length, tuple | list) else (self.length,)
        exact = isinstance(controls.lengths, int)
        if exact and any(isinstance(n, int) and n > controls.lengths for n in asked):
            raise ConfigError(
                f"length={self.length}: the run knows up to {controls.lengths} words, which also stands for more"
            )
        self._decode_options(config)
        check_can_choose(self.best_of, has_scorer=self.scorer is not None or has_contrastive(config))

    def check_records(self) -> None:
        _ = self._references, self._language_model, self._scorer

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        prepared = self.prepare(components, batch_size=batch_size, cache=cache)
        return self.judge(components, prepared, self.write(components, prepared))

    def prepare(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> Prepared:
        """Images, references, and all about them that the scorer and the lexicon say."""
        self.check_config(components.config)
        record_set = self.opened()
        items, left_out = self._items(components)
        loaded = dict(load_pixels(components, record_set, [item.index for item in items]))
        unreadable = [
            {"id": record_set.describe(i)["id"], "error": str(error)}
            for i, error in loaded.items()
            if isinstance(error, ImageError)
        ]
        items = [item for item in items if not isinstance(loaded[item.index], ImageError)]
        if len(items) < 2:
            raise DataError(
                f"{describe(record_set)}: {len(items)} images with references can be read, captions need 2 or more"
                + (f"; the first error: {unreadable[0]['error']}" if unreadable else "")
            )
        scorer, embeddings = self._scorer_of(components), None
        if scorer is not None:
            own = scorer is components
            image, _, _ = encode_records(
                scorer,
                record_set,
                [item.index for item in items],
                need="embed",
                batch_size=batch_size,
                cache=cache if own else self._scorer_cache,
            )
            texts = [text for item in items for text in item.references]
            embeddings = Embeddings.of(
                image,
                embed_texts(scorer, texts, batch_size=batch_size),
                np.repeat(np.arange(len(items)), [len(item.references) for item in items]),
            )
        return Prepared(
            items=items,
            pixels=[loaded[item.index] for item in items],
            scorer=scorer,
            embeddings=embeddings,
            truths=self._truths(record_set, items),
            left_out=left_out,
            unreadable=unreadable,
        )

    def write(self, components: Components, prepared: Prepared, *, always_guided: bool = False) -> list[str]:
        """A caption for each of the prepared images. always_guided: see `write_captions`."""
        return best_captions(
            components,
            prepared.pixels if prepared.tokens is None else prepared.tokens,
            options=self._decode_options(components.config),
            scorer=prepared.scorer,
            image_embed=None if prepared.embeddings is None else prepared.embeddings.image,
            batch_size=self._batch_size(prepared),
            guidance=self.guidance,
            guidance_null=self.guidance_null,
            language_model=self._language_model,
            controls={
                "section": self.section,
                "length": self._lengths(components, prepared.items),
                "quality": self.quality,
                "prompt": self._prompts(prepared.items),
            },
            seed=self.seed,
            always_guided=always_guided,
        )

    def encoded(self, components: Components, prepared: Prepared) -> Prepared:
        """The same with its images encoded, for those who write captions of them more than once."""
        batch_size = self._batch_size(prepared)
        tokens = encode_for_captions(components, prepared.pixels, batch_size=batch_size)
        return dataclasses.replace(prepared, tokens=tokens)

    def _batch_size(self, prepared: Prepared) -> int:
        return min(self.decode_batch_size, len(prepared.items))

    def _decode_options(self, config: Config) -> DecodeOptions:
        fields = {f.name for f in dataclasses.fields(DecodeOptions)} & {
            f.name for f in dataclasses.fields(self)
        }
        return decode_options(config, best_of=self.best_of, **{name: getattr(self, name) for name in fields})

    def judge(self, components: Components, prepared: Prepared, captions: Sequence[str]) -> EvalResult:
        """The scores of one caption for each of the prepared images."""
        record_set, items = self.opened(), prepared.items
        groups = record_set.groups()
        found = Collector()
        scores = Scores(found, [groups[item.index] for item in items], record_set.group_unit())
        found.metrics |= {
            "num_images": len(items),
            "num_references": sum(len(item.references) for item in items),
        }
        columns = text_scores(captions, [item.references for item in items], scores)
        cut = 0
        if prepared.embeddings is not None:
            caption = embed_texts(prepared.scorer, captions)
            cut = prepared.scorer.tokenizer.count_truncated(captions)
            columns |= alignment_scores(caption, prepared.embeddings, scores, seed=self.seed)
        if prepared.truths is not None:
            columns |= stated_findings(captions, prepared.truths, scores)
        asked = self._lengths(components, items)
        if asked is not None:
            columns |= length_scores(captions, asked, scores)
        per_example = [
            {
                "id": record_set.describe(item.index)["id"],
                **({"prompt": item.prompt} if item.prompt is not None else {}),
                "caption": captions[row],
                "references": list(item.references),
                **{name: values[row] for name, values in columns.items()},
            }
            for row, item in enumerate(items)
        ]
        return EvalResult(
            found.metrics,
            provenance(
                components,
                record_set,
                [item.index for item in items],
                left_out=prepared.left_out,
                unreadable=prepared.unreadable,
                undefined=found.undefined,
                text=self.text if self.text is not None else self.source.text,
                decoding=self._decoding(components),
                scorer=self._scorer_provenance(components, prepared.scorer),
                lexicon=self.lexicon,
                **(
                    {"finding_rules": dataclasses.asdict(FINDING_RULES)}
                    if prepared.truths is not None
                    else {}
                ),
                num_captions_cut_by_scorer=cut,
            ),
            per_example,
        )

    @functools.cached_property
    def _references(self) -> tuple[dict[int, tuple[str, ...]], dict[str, int]]:
        """(record index -> its references, count of records left out by reason)."""
        record_set = self.opened()
        choice = self.source.choice(self.text)
        candidates, left_out = with_images(record_set)
        found = {i: tuple(choice.for_evaluation(record_set.describe(i))) for i in candidates}
        found = {i: texts for i, texts in found.items() if texts}
        if len(found) < len(candidates):
            left_out["without text"] += len(candidates) - len(found)
        if len(found) < 2:
            wanted = " or ".join(name for name, _ in choice.options)
            raise DataError(
                f"{describe(record_set)}: {len(found)} records have an image and the text {wanted!r}, captions need 2 "
                f"or more references; fields that records have: {fields_of(record_set)}"
            )
        if self.lexicon == "phantoms":
            without = [i for i in found if not has_facts(record_set.describe(i))]
            if without:
                raise DataError(
                    f"{describe(record_set)}: record {record_set.describe(without[0])['id']!r} has no facts of phantoms, "
                    "which lexicon='phantoms' reads; set lexicon='chest' or 'none'"
                )
        return found, dict(left_out)

    def _items(self, components: Components) -> tuple[list[CaptionItem], dict[str, int]]:
        record_set, controls = self.opened(), components.config.data.controls
        references, left_out = self._references
        left_out = collections.Counter(left_out)
        images: dict[Any, list[int]] = collections.defaultdict(list)
        prompts: dict[int, str | None] = {}
        for i in references:
            record = record_set.describe(i)
            prompts[i] = controls.prompt_of(record)
            if prompts[i] is not None:
                # Training cuts such a prompt; what is asked then is something else.
                if len(components.tokenizer.ids(prompts[i])) > controls.prompt_tokens:
                    left_out["prompt beyond data.controls.prompt_tokens"] += 1
                    continue
            image = record["image"]
            images[(image if isinstance(image, str) else i), prompts[i]].append(i)
        chosen = list(images.values())
        if self.max_images is not None and len(chosen) > self.max_images:
            order = np.random.default_rng(self.seed).permutation(len(chosen))[: self.max_images]
            left_out["beyond max_images"] += len(chosen) - self.max_images
            chosen = [chosen[i] for i in sorted(order)]
        items = [
            CaptionItem(
                records[0],
                tuple(dict.fromkeys(text for i in records for text in references[i])),
                prompts[records[0]],
            )
            for records in chosen
        ]
        return items, dict(left_out)

    def _lengths(self, components: Components, items: Sequence[CaptionItem]) -> list[int] | None:
        """The words to ask for, of each image."""
        if self.length is None:
            return None
        if self.length != "reference":
            turns = (self.length,) if isinstance(self.length, int) else self.length
            return [turns[row % len(turns)] for row in range(len(items))]
        controls = components.config.data.controls
        # Of exact lengths the last one stands for more, and more cannot be asked for.
        most = controls.length_values[-1] if isinstance(controls.lengths, int) else None
        words = [num_words(item.references[0]) for item in items]
        return words if most is None else [min(n, most) for n in words]

    def _prompts(self, items: Sequence[CaptionItem]) -> list[str | None] | None:
        prompts = [item.prompt for item in items]
        return prompts if any(prompt is not None for prompt in prompts) else None

    def _truths(self, record_set: RecordSet, items: Sequence[CaptionItem]) -> list[Truth] | None:
        if self.lexicon == "none":
            return None
        if self.lexicon == "chest":
            return [Truth(label_text("\n".join(i.references), CHEST_LEXICON), CHEST_LEXICON) for i in items]
        nothing = dict.fromkeys(_PHANTOM_LEXICON.findings, "absent")
        facts = [record_set.describe(item.index)["facts"]["findings"] for item in items]
        return [
            Truth(nothing | {name: fact["presence"] for name, fact in findings.items()}, _PHANTOM_LEXICON)
            for findings in facts
        ]

    @functools.cached_property
    def _scorer(self) -> Components | None:
        """The contrastive model that the suite names, read once however often it runs."""
        if self.scorer is None:
            return None
        scorer = load_components(self.scorer)
        check_scorer(scorer)
        return scorer

    @functools.cached_property
    def _scorer_cache(self) -> Cache:
        return {}

    @functools.cached_property
    def _language_model(self) -> Components | None:
        if self.language_model is None:
            return None
        language_model = load_components(self.language_model)
        captioning_task_of(language_model.config)
        return language_model

    def _scorer_of(self, components: Components) -> Components | None:
        return self._scorer if self._scorer is not None else own_scorer(components)

    def _decoding(self, components: Components) -> dict[str, Any]:
        """The options that captions depend on, ready for JSON."""
        left_out = {"source", "task", "text", "scorer", "lexicon", "max_images", "decode_batch_size"}
        fields = [f.name for f in dataclasses.fields(self) if f.name not in left_out]
        options = {name: getattr(self, name) for name in fields}
        if options["max_length"] is None:
            options["max_length"] = longest_text(components.config)
        if self._language_model is not None:
            options["language_model_hash"] = self._language_model.weights_hash()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}

    def _scorer_provenance(self, components: Components, scorer: Components | None) -> dict[str, Any] | None:
        if scorer is None:
            return None
        return {
            "run": "the run itself" if scorer is components else self.scorer,
            "weights_hash": scorer.weights_hash(),
            "step": scorer.step,
            "preprocess_hash": content_hash(scorer.preprocess.to_dict()),
            "tokenizer_hash": scorer.tokenizer.hash,
        }


# Names and nouns of a modality's findings are no other's, so captions that take one for another are seen too.
_PHANTOM_LEXICON = Lexicon({name: words for own in FINDING_LEXICON.values() for name, words in own.items()})


def has_facts(record: dict[str, Any]) -> bool:
    """Whether a record has the facts of phantoms."""
    facts = record.get("facts")
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("findings"), dict)
        and facts["findings"].keys() <= _PHANTOM_LEXICON.findings.keys()
    )
