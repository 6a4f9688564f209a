"""The words of each finding of the phantoms, by modality, for a labeller of texts."""

import re

from bvl.data.phantoms.catalogue import CATALOGUE

# modality -> finding -> patterns. A noun of one modality may occur in the texts of another: take the modality's own.
FINDING_LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    modality.name: {
        finding.name: tuple(re.escape(noun).replace(r"\ ", " ") for pair in finding.nouns for noun in pair)
        for finding in modality.findings
    }
    for modality in CATALOGUE.values()
}
