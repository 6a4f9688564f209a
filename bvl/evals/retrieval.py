"""Image-text retrieval in both directions, with every pair that says the same counted as right."""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np

from bvl.data.long_texts import LongTexts
from bvl.data.sources import Source
from bvl.data.text_choice import text_id
from bvl.errors import ConfigError, DataError
from bvl.evals.base import (
    BOOTSTRAP_SAMPLES,
    LEVEL,
    Cache,
    Collector,
    EvalResult,
    Suite,
    describe,
    encode_records,
    fields_of,
    provenance,
    with_images,
)
from bvl.metrics.bootstrap import bootstrap_mean
from bvl.metrics.retrieval import recall_at_k
from bvl.runs import Components
from bvl.tasks.contrastive import embed_texts

KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Suite):
    """Recall at 1, 5 and 10 of images by text (t2i) and texts by image (i2t), beside the level of chance.

    Each record gives pairs of its image with its evaluation texts: by default one, the first alternative of the most
    probable option of the choice of texts.
    Records with the same image path are one image with several texts. A text is right for an image if the image
    has that text or an equal one (without regard to case and spacing). Every record's text is a query and a target
    of its own, also where texts are equal: all images with that text are then right.

    max_images: take so many images, drawn by `seed`, with all their texts; None = all.
    text: the field or fields to read, None = the source's.
    texts_per_image: read so many different texts of each record, of the most probable option first; None = all, of
      every option. Each is a query and a target of its own, and an image is found by any of its texts.
    long_texts: texts beyond the context are read to there ("cut") or whole in pieces ("chunks", see `embed_texts`).
    """

    source: Source
    max_images: int | None = None
    text: str | dict[str, float] | None = None
    texts_per_image: int | None = 1
    long_texts: LongTexts = "cut"
    seed: int = 0

    def __post_init__(self):
        if self.max_images is not None and self.max_images < 2:
            raise ConfigError(f"max_images={self.max_images}: retrieval needs at least 2")
        if self.texts_per_image is not None and self.texts_per_image < 1:
            raise ConfigError(f"texts_per_image={self.texts_per_image}: give 1 or more, or None for all")
        self.source.choice(self.text)

    @functools.cached_property
    def _pairs(self) -> tuple[list[tuple[int, int, str]], dict[str, int]]:
        """((image number, record index, text) of every pair, count of records left out by reason)."""
        record_set = self.opened()
        choice = self.source.choice(self.text)
        candidates, left_out = with_images(record_set)
        texts = {
            i: found[: self.texts_per_image]
            for i in candidates
            if (found := choice.for_evaluation(record_set.describe(i)))
        }
        if len(texts) < len(candidates):
            left_out["without text"] += len(candidates) - len(texts)
        if len(texts) < 2:
            wanted = " or ".join(name for name, _ in choice.options)
            raise DataError(
                f"{describe(record_set)}: {len(texts)} records have an image and the text {wanted!r}, retrieval needs "
                f"2 or more; fields that records have: {fields_of(record_set)}"
            )
        images: dict[object, list[int]] = collections.defaultdict(list)
        for i in texts:
            images[_image_key(record_set.describe(i), i)].append(i)
        chosen = list(images.values())
        if self.max_images is not None and len(chosen) > self.max_images:
            order = np.random.default_rng(self.seed).permutation(len(chosen))[: self.max_images]
            left_out["beyond max_images"] = len(texts) - sum(len(chosen[i]) for i in order)
            chosen = [chosen[i] for i in sorted(order)]
        pairs = [(n, i, text) for n, records in enumerate(chosen) for i in records for text in texts[i]]
        return pairs, dict(left_out)

    def check_records(self) -> None:
        pairs, _ = self._pairs
        if len({text_id(text) for _, _, text in pairs}) < 2:
            raise DataError(
                f"{describe(self.opened())}: all texts are equal ({pairs[0][2]!r}), so any order is right"
            )

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_records()
        record_set = self.opened()
        pairs, left_out = self._pairs
        first_record = {number: index for number, index, _ in reversed(pairs)}
        indices = [first_record[number] for number in sorted(first_record)]
        image, kept, unreadable = encode_records(
            components, record_set, indices, need="embed", batch_size=batch_size, cache=cache
        )
        row_of = {int(index): row for row, index in enumerate(kept)}
        pairs = [(row_of[first_record[n]], i, text) for n, i, text in pairs if first_record[n] in row_of]
        ids = [text_id(text) for _, _, text in pairs]
        ids_of_image: list[set[int]] = [set() for _ in kept]
        for (row, _, _), one in zip(pairs, ids, strict=True):
            ids_of_image[row].add(one)
        queries = [text for _, _, text in pairs]
        texts = embed_texts(components, queries, long=self.long_texts, batch_size=batch_size)
        cut = components.tokenizer.count_truncated(queries) if self.long_texts == "cut" else 0
        result = recall_at_k(image, texts, ids_of_image, ids, ks=KS)

        groups = record_set.groups()
        query_groups = {"i2t": [groups[i] for i in kept], "t2i": [groups[i] for _, i, _ in pairs]}
        out = Collector()
        for direction, group in query_groups.items():
            for k in KS:
                name = f"{direction}_r{k}"
                interval = bootstrap_mean(
                    result.hits[name],
                    group,
                    num_samples=BOOTSTRAP_SAMPLES,
                    level=LEVEL,
                    unit=record_set.group_unit(),
                )
                out.add(name, result.rates[name], interval)
                out.add(f"{name}/chance", result.rates[f"{name}_chance"])
        out.metrics |= {
            "num_images": len(kept),
            "num_texts": len(pairs),
            "num_distinct_texts": len(set(ids)),
        }
        per_example = [
            {
                "id": record_set.describe(i)["id"],
                "text": text,
                **{f"i2t_r{k}": int(result.hits[f"i2t_r{k}"][row]) for k in KS},
                **{f"t2i_r{k}": int(result.hits[f"t2i_r{k}"][query]) for k in KS},
            }
            for query, (row, i, text) in enumerate(pairs)
        ]
        return EvalResult(
            out.metrics,
            provenance(
                components,
                record_set,
                list(dict.fromkeys(i for _, i, _ in pairs)),
                left_out=left_out,
                unreadable=unreadable,
                undefined=out.undefined,
                text=self.text if self.text is not None else self.source.text,
                max_images=self.max_images,
                texts_per_image=self.texts_per_image,
                long_texts=self.long_texts,
                num_truncated_texts=cut,
            ),
            per_example,
        )


def _image_key(record: dict, index: int) -> object:
    """Equal for records of one image; encoded bytes are not compared."""
    image = record["image"]
    return image if isinstance(image, str) else index
