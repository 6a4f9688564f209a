"""What the phantoms can show: modalities, findings, sites, and the words for each of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of finding: its words, and the ranges that its drawn shape is taken from.

    Lengths are fractions of the image side. `small` and `large` are ranges of the semi-major axis that do
    not touch, so that the size named in a text can be decided from the image.
    """

    name: str
    nouns: tuple[tuple[str, str], ...]  # (singular, plural), the commonest first
    small: tuple[float, float]
    large: tuple[float, float]
    aspect: tuple[float, float] = (1.0, 1.2)
    wobble: float = 0.0  # irregularity of the outline, as a fraction of the minor axis
    bend: float = 0.0  # curvature of the long axis, for crescents
    dots: int = 0  # drawn as a cluster of so many dots instead of one shape
    tilt: float = 3.14159  # the long axis lies within +-tilt / 2 of the horizontal
    severity_words: tuple[tuple[str, ...], tuple[str, ...]] = (("faint",), ("prominent",))  # mild, marked
    max_count: int = 3


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality: its findings, views, sites, and the words for them."""

    name: str
    article: str
    synonyms: tuple[str, ...]
    views: tuple[str, ...]
    subject: str
    findings: tuple[Finding, ...]
    sites: dict[
        str, tuple[str, ...]
    ]  # site -> phrases; "both" is used when the findings lie in several sites


DENSE = (("faint",), ("dense",))
STAINED = (("pale",), ("dark",))

_CATALOGUE = (
    Modality(
        name="chest radiograph",
        article="a",
        synonyms=("chest radiograph", "chest x-ray", "frontal chest radiograph"),
        views=("frontal",),
        subject="the chest",
        findings=(
            Finding(
                name="nodule",
                nouns=(("nodule", "nodules"), ("round opacity", "round opacities")),
                small=(0.05, 0.058),
                large=(0.078, 0.092),
                severity_words=DENSE,
            ),
            Finding(
                name="cavity",
                nouns=(("cavity", "cavities"), ("cavitary lesion", "cavitary lesions")),
                small=(0.07, 0.078),
                large=(0.105, 0.12),
                wobble=0.1,
                severity_words=DENSE,
            ),
            Finding(
                name="consolidation",
                nouns=(("consolidation", "consolidations"), ("airspace opacity", "airspace opacities")),
                small=(0.09, 0.1),
                large=(0.13, 0.145),
                aspect=(1.0, 1.25),
                wobble=0.15,
                severity_words=DENSE,
                max_count=2,
            ),
            Finding(
                name="atelectasis band",
                nouns=(("atelectasis band", "atelectasis bands"), ("linear opacity", "linear opacities")),
                small=(0.095, 0.108),
                large=(0.14, 0.16),
                aspect=(4.5, 5.0),
                tilt=1.6,
                severity_words=DENSE,
                max_count=2,
            ),
        ),
        # Sides are the patient's: the patient's left is on the right of the image.
        sites={
            "left": ("in the left lung", "on the left"),
            "right": ("in the right lung", "on the right"),
            "both": ("in both lungs", "on both sides"),
        },
    ),
    Modality(
        name="fundus photograph",
        article="a",
        synonyms=("fundus photograph", "retinal photograph", "colour fundus photograph"),
        views=("left eye", "right eye"),
        subject="the retina",
        findings=(
            Finding(
                name="haemorrhage",
                nouns=(("haemorrhage", "haemorrhages"), ("retinal haemorrhage", "retinal haemorrhages")),
                small=(0.055, 0.064),
                large=(0.086, 0.1),
                aspect=(1.0, 1.4),
                wobble=0.2,
                severity_words=(("faint",), ("dark",)),
                max_count=2,
            ),
            Finding(
                name="hard exudates",
                nouns=(
                    ("exudate cluster", "exudate clusters"),
                    ("cluster of hard exudates", "clusters of hard exudates"),
                ),
                small=(0.076, 0.085),
                large=(0.112, 0.126),
                dots=7,
                severity_words=(("faint",), ("bright",)),
                max_count=2,
            ),
            Finding(
                name="cotton wool spot",
                nouns=(
                    ("cotton wool spot", "cotton wool spots"),
                    ("fluffy white patch", "fluffy white patches"),
                ),
                small=(0.056, 0.064),
                large=(0.086, 0.1),
                aspect=(1.0, 1.4),
                wobble=0.15,
                severity_words=(("faint",), ("bright",)),
                max_count=2,
            ),
            Finding(
                name="laser scar",
                nouns=(("laser scar", "laser scars"), ("photocoagulation scar", "photocoagulation scars")),
                small=(0.066, 0.074),
                large=(0.095, 0.11),
            ),
        ),
        sites={
            "superotemporal": ("in the superotemporal quadrant", "superotemporally"),
            "superonasal": ("in the superonasal quadrant", "superonasally"),
            "inferotemporal": ("in the inferotemporal quadrant", "inferotemporally"),
            "inferonasal": ("in the inferonasal quadrant", "inferonasally"),
            "both": ("in several quadrants", "in more than one quadrant"),
        },
    ),
    Modality(
        name="blood smear",
        article="a",
        synonyms=("blood smear", "blood film", "stained blood smear"),
        views=("crowded field", "sparse field"),
        subject="peripheral blood",
        findings=(
            Finding(
                name="sickle cell",
                nouns=(("sickle cell", "sickle cells"), ("crescent-shaped cell", "crescent-shaped cells")),
                small=(0.085, 0.098),
                large=(0.13, 0.148),
                aspect=(2.6, 3.0),
                bend=0.55,
                severity_words=STAINED,
            ),
            Finding(
                name="target cell",
                nouns=(("target cell", "target cells"), ("codocyte", "codocytes")),
                small=(0.078, 0.088),
                large=(0.115, 0.128),
                severity_words=STAINED,
            ),
            Finding(
                name="malaria parasite",
                nouns=(("malaria parasite", "malaria parasites"), ("parasitised cell", "parasitised cells")),
                small=(0.076, 0.086),
                large=(0.112, 0.125),
                severity_words=STAINED,
            ),
            Finding(
                name="lymphocyte",
                nouns=(("lymphocyte", "lymphocytes"), ("mononuclear white cell", "mononuclear white cells")),
                small=(0.07, 0.08),
                large=(0.105, 0.12),
                wobble=0.06,
                severity_words=STAINED,
                max_count=2,
            ),
        ),
        sites={
            "upper": ("in the upper half", "in the upper half of the field"),
            "lower": ("in the lower half", "in the lower half of the field"),
            "both": ("in both halves", "in the upper and lower half"),
        },
    ),
    Modality(
        name="ultrasound image",
        article="an",
        synonyms=("ultrasound image", "sonogram", "abdominal ultrasound image"),
        views=("sector",),
        subject="the abdomen",
        findings=(
            Finding(
                name="cyst",
                nouns=(("cyst", "cysts"), ("anechoic lesion", "anechoic lesions")),
                small=(0.056, 0.064),
                large=(0.088, 0.104),
                aspect=(1.0, 1.3),
            ),
            Finding(
                name="stone",
                nouns=(("stone", "stones"), ("calculus", "calculi")),
                small=(0.05, 0.058),
                large=(0.078, 0.09),
                aspect=(1.3, 1.7),
                tilt=0.5,
            ),
            Finding(
                name="heterogeneous mass",
                nouns=(
                    ("heterogeneous mass", "heterogeneous masses"),
                    ("mixed-echo mass", "mixed-echo masses"),
                ),
                small=(0.08, 0.09),
                large=(0.12, 0.135),
                aspect=(1.0, 1.3),
                wobble=0.15,
            ),
            Finding(
                name="target lesion",
                nouns=(("target lesion", "target lesions"), ("haloed lesion", "haloed lesions")),
                small=(0.076, 0.085),
                large=(0.112, 0.126),
                aspect=(1.0, 1.2),
                max_count=2,
            ),
        ),
        sites={
            "near": ("in the near field", "close to the probe"),
            "far": ("in the far field", "far from the probe"),
            "both": ("in the near and far field", "at several depths"),
        },
    ),
)

CATALOGUE: dict[str, Modality] = {modality.name: modality for modality in _CATALOGUE}
MODALITIES: tuple[str, ...] = tuple(CATALOGUE)
FINDINGS: dict[str, tuple[str, ...]] = {
    modality.name: tuple(finding.name for finding in modality.findings) for modality in _CATALOGUE
}
FINDING_OF: dict[str, Finding] = {finding.name: finding for m in _CATALOGUE for finding in m.findings}
# What a single one is called, the name itself aside.
FINDING_NOUNS: dict[str, tuple[str, ...]] = {
    name: tuple(singular for singular, _ in finding.nouns if singular != name)
    for name, finding in FINDING_OF.items()
}
FINDING_MODALITY: dict[str, str] = {name: modality for modality, names in FINDINGS.items() for name in names}

MODALITY_PROMPTS: dict[str, tuple[str, ...]] = {
    m.name: (
        f"{m.article} {m.name}",
        f"{m.article} {m.name} of {m.subject}",
        m.synonyms[1],
    )
    for m in _CATALOGUE
}


def indefinite(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _finding_prompts(finding: Finding, modality: Modality) -> dict[str, tuple[str, ...]]:
    (singular, plural), other = finding.nouns[0], finding.nouns[1]
    return {
        "positive": (
            f"{modality.name} with {indefinite(singular)}",
            f"{modality.name} showing {plural}",
            f"{modality.name} with {indefinite(other[0])}",
        ),
        "negative": (
            f"{modality.name} without {indefinite(singular)}",
            f"{modality.name} showing no {plural}",
            f"{modality.name} without {indefinite(other[0])}",
        ),
    }


FINDING_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    finding.name: _finding_prompts(finding, m) for m in _CATALOGUE for finding in m.findings
}
