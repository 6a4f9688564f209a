"""One caption for each image: the options of a search, and the best of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError
from bvl.runs import Components
from bvl.tasks.captioning import check_scorer, longest_text, rerank, write_captions
from bvl.tasks.contrastive import Contrastive


def decode_options(
    components: Components, *, best_of: int = 1, max_length: int | None = None, **search: Any
) -> DecodeOptions:
    """The options of a search that gives `best_of` candidates; max_length=None: as long as training texts can be.

    Candidates are independent samples at a temperature above 0, else the best of the beams.
    """
    if best_of < 1:
        raise ConfigError(f"best_of={best_of}: must be at least 1")
    if best_of > 1 and not search.get("temperature") and search.get("beams", 1) < best_of:
        raise ConfigError(
            f"best_of={best_of} with beams={search.get('beams', 1)}: set beams as high, or a temperature above 0 for "
            "independent samples"
        )
    max_length = longest_text(components) if max_length is None else max_length
    return DecodeOptions(max_length=max_length, num_return=best_of, **search)


def own_scorer(components: Components) -> Components | None:
    """The run itself where a Contrastive task has trained its embeddings, which else say nothing."""
    trained = any(isinstance(task, Contrastive) for task in components.config.tasks.values())
    return components if trained and components.model.config.embeds_text else None


def best_captions(
    components: Components,
    images: Sequence[Any],
    *,
    options: DecodeOptions,
    scorer: Components | None = None,
    originals: Sequence[Any] | None = None,
    batch_size: int,
    **how: Any,
) -> list[str]:
    """One text an image: the best by the search, or of several candidates the most like the image to the scorer.

    originals: the images as the scorer is to read them, where `images` were already made ready for the captioner.
    how: further arguments of `write_captions`. Raises ConfigError for several candidates without a scorer.
    """
    if options.num_return > 1:
        if scorer is None:
            raise ConfigError(
                f"best_of={options.num_return} needs a contrastive model to choose, which this run is not: name one as "
                "scorer"
            )
        check_scorer(scorer)
    candidates = write_captions(components, images, options=options, batch_size=batch_size, **how)
    if options.num_return == 1:
        return [row[0].text for row in candidates]
    return rerank(scorer, images if originals is None else originals, candidates, batch_size=batch_size)
