"""Phantoms: synthetic biomedical images with exact ground truth, drawn on demand.

`PhantomSource(Phantoms(...))[i]` is a record that depends on the seed and the index alone.
"""

from bvl.data.phantoms.catalogue import (
    FINDING_MODALITY,
    FINDING_NOUNS,
    FINDING_PROMPTS,
    FINDINGS,
    MODALITIES,
    MODALITY_PROMPTS,
)
from bvl.data.phantoms.lexicon import FINDING_LEXICON
from bvl.data.phantoms.source import SPLITS, Phantoms, PhantomSource
from bvl.data.phantoms.writer import write_phantoms

__all__ = [
    "FINDINGS",
    "FINDING_LEXICON",
    "FINDING_MODALITY",
    "FINDING_NOUNS",
    "FINDING_PROMPTS",
    "MODALITIES",
    "MODALITY_PROMPTS",
    "SPLITS",
    "PhantomSource",
    "Phantoms",
    "write_phantoms",
]
