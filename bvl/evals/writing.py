"""One caption for each image: the options of a search, and the best of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bvl.config import Config
from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError
from bvl.runs import Components
from bvl.tasks.captioning import (
    ImageTokens,
    check_max_length,
    check_scorer,
    longest_text,
    rerank,
    write_captions,
)
from bvl.tasks.contrastive import embed_images, has_contrastive


def decode_options(
    config: Config,
    *,
    best_of: int = 1,
    max_length: int | None = None,
    of_regions: bool = False,
    **search: Any,
) -> DecodeOptions:
    """The options of a search that gives `best_of` candidates; max_length=None: as long as training texts can be, of
    images or of regions.

    Candidates are independent samples at a temperature above 0, else the best of the beams. Raises ConfigError for
    what no search can use, and for texts longer than the run of `config` was trained on.
    """
    if best_of < 1:
        raise ConfigError(f"best_of={best_of}: must be at least 1")
    if best_of > 1 and not search.get("temperature") and search.get("beams", 1) < best_of:
        raise ConfigError(
            f"best_of={best_of} with beams={search.get('beams', 1)}: set beams as high, or a temperature above 0 for "
            "independent samples"
        )
    if max_length is None:
        max_length = longest_text(config, of_regions=of_regions)
    options = DecodeOptions(max_length=max_length, num_return=best_of, **search)
    check_max_length(config, options, of_regions=of_regions)
    return options


def own_scorer(components: Components) -> Components | None:
    """The run itself where a Contrastive task has trained its embeddings, which else say nothing."""
    return components if has_contrastive(components.config) else None


def check_can_choose(best_of: int, *, has_scorer: bool) -> None:
    """Raise ConfigError for several candidates and none who could choose."""
    if best_of > 1 and not has_scorer:
        raise ConfigError(
            f"best_of={best_of} needs a contrastive model to choose, which this run is not: name one as scorer"
        )


def best_captions(
    components: Components,
    images: Sequence[Any] | ImageTokens,
    *,
    options: DecodeOptions,
    scorer: Components | None = None,
    image_embed: Float[np.ndarray, "n d"] | None = None,
    batch_size: int,
    **how: Any,
) -> list[str]:
    """One text an image: the best by the search, or of several candidates the most like the image to the scorer.

    image_embed: the images' embeddings by the scorer, None = of `images`; give them where `images` were already made
      ready for the captioner.
    how: further arguments of `write_captions`. Raises ConfigError for several candidates without a scorer.
    """
    check_can_choose(options.num_return, has_scorer=scorer is not None)
    if options.num_return > 1:
        check_scorer(scorer)
    candidates = write_captions(components, images, options=options, batch_size=batch_size, **how)
    if options.num_return == 1:
        return [row[0].text for row in candidates]
    if image_embed is None:
        image_embed = embed_images(scorer, images, batch_size=batch_size)
    return rerank(scorer, image_embed, candidates, batch_size=batch_size)
