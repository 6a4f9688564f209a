"""The labeller of findings: hand-made sentences, phantom texts, the lexicon, and the scores over labels."""

import csv
import math
import pathlib

import numpy as np
import pytest

from bvl.data.phantoms import FINDING_LEXICON, Phantoms, PhantomSource
from bvl.errors import ConfigError, DataError, UserError
from bvl.metrics.findings import OUTCOMES, FindingRules, finding_scores, finding_tables, label_texts
from bvl.metrics.labeller import Lexicon, label_text
from bvl.metrics.lexicon import CHEST_LEXICON

# Findings of other fields than chest radiographs that the sentences mention.
OTHER_FINDINGS = {
    "haemorrhage": ("haemorrhages?",),
    "exudate": ("(?:hard )?exudates?",),
    "neovascularisation": ("neovascularisation",),
    "drusen": ("drusen",),
    "macular oedema": ("macular oedema",),
    "cotton wool spot": ("cotton wool spots?",),
    "gallstone": ("(?:gall)?stones?",),
    "sludge": ("sludge",),
    "metastasis": ("metastas[ie]s",),
    "necrosis": ("necrosis",),
    "mitosis": ("mitos[ie]s",),
    "invasion": ("(?:lymphovascular )?invasion",),
    "tumour": ("tumours?",),
    "sickle cell": ("sickle cells?",),
    "malaria parasite": ("malaria parasites?",),
}
# Without statements of normality: a sentence then names all that it states.
SENTENCE_LEXICON = Lexicon({**CHEST_LEXICON.findings, **OTHER_FINDINGS})


def hand_made() -> list[tuple[str, dict]]:
    with open(pathlib.Path(__file__).parent / "labeller_sentences.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        (
            row["sentence"],
            {} if row["expected"] == "-" else dict(pair.split("=") for pair in row["expected"].split("; ")),
        )
        for row in rows
    ]


def test_there_are_200_hand_made_sentences_of_every_status():
    sentences = hand_made()
    assert len({text for text, _ in sentences}) == 200
    statuses = [status for _, expected in sentences for status in expected.values()]
    assert min(statuses.count(status) for status in ("present", "absent", "uncertain")) >= 50


@pytest.mark.parametrize("sentence, expected", hand_made())
def test_hand_made_sentence(sentence, expected):
    assert label_text(sentence, SENTENCE_LEXICON) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        # Met in reports, where lists, stops and spaces are less tidy than in the sentences.
        ("No acute, displaced rib fractures identified.", {"fracture": "absent"}),
        ("No large effusion, pneumothorax.", {"pleural effusion": "absent", "pneumothorax": "absent"}),
        ("No evidence of an effusion and scars.", {"pleural effusion": "absent", "scar": "present"}),
        ("No effusion.. Minimal atelectasis noted", {"pleural effusion": "absent", "atelectasis": "present"}),
        ("No effusion.Heart is enlarged.", {"pleural effusion": "absent", "cardiomegaly": "present"}),
        ("No change right upper lobe cavity.", {"cavity": "present"}),
        ("No cavitary changes to suggest tuberculosis.", {"cavity": "absent", "tuberculosis": "absent"}),
        (
            "No line to suggest pneumothorax or blunting to suggest effusion.",
            {"pneumothorax": "absent", "pleural effusion": "absent"},
        ),
        ("No effusion or possible nodule.", {"pleural effusion": "absent", "nodule": "uncertain"}),
        ("Question small effusion.", {"pleural effusion": "uncertain"}),
        ("No effusion and nodules.", {"pleural effusion": "absent", "nodule": "present"}),
        ("No effusions and nodules.", {"pleural effusion": "absent", "nodule": "absent"}),
        (
            "No mass, no nodules and granulomas.",
            {"mass": "absent", "nodule": "absent", "granuloma": "present"},
        ),
    ],
)
def test_untidy_text(text, expected):
    assert label_text(text, SENTENCE_LEXICON) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Small nodule. No nodule on the left. Possible nodule.", "present"),
        ("No nodule on the left. Possible nodule on the right.", "uncertain"),
        ("No nodule. No nodules.", "absent"),
        ("Clear lungs.", None),
    ],
)
def test_present_counts_before_uncertain_before_absent(text, expected):
    assert label_text(text, Lexicon({"nodule": ("nodules?",)})).get("nodule") == expected


def test_statement_of_normality_denies_its_findings_and_yields_to_what_is_said():
    lexicon = Lexicon(
        {"nodule": ("nodules?",), "effusion": ("effusions?",), "scar": ("scars?",)},
        normal={"no abnormality": ("nodule", "effusion", "scar"), "lungs are clear": ("nodule",)},
    )
    assert label_text("No abnormality.", lexicon) == {
        "nodule": "absent",
        "effusion": "absent",
        "scar": "absent",
    }
    assert label_text("The lungs are clear.", lexicon) == {"nodule": "absent"}
    assert label_text("No abnormality except for a scar.", lexicon)["scar"] == "present"
    assert label_text("A scar. Otherwise no abnormality.", lexicon)["scar"] == "present"
    assert label_text("No abnormality or effusion.", lexicon)["effusion"] == "absent"
    assert label_text("It is not true that the lungs are clear.", lexicon) == {}


def test_chest_lexicon_knows_normality():
    labels = label_text("Heart size is normal. Lungs are clear.", CHEST_LEXICON)
    assert labels["cardiomegaly"] == labels["pneumonia"] == labels["nodule"] == "absent"
    assert "fracture" not in labels
    labels = label_text("Normal chest.", CHEST_LEXICON)
    assert set(labels) == set(CHEST_LEXICON.findings) and set(labels.values()) == {"absent"}


def test_longer_words_hide_those_of_another_finding_within_them():
    lexicon = Lexicon({"opacity": ("opacit(?:y|ies)",), "consolidation": ("airspace opacit(?:y|ies)",)})
    assert label_text("An airspace opacity.", lexicon) == {"consolidation": "present"}
    assert label_text("No airspace-opacities, one opacity.", lexicon) == {
        "consolidation": "absent",
        "opacity": "present",
    }


def test_a_lexicon_that_cannot_be_used_is_refused():
    with pytest.raises(UserError, match="'nodule' are no regular expression"):
        Lexicon({"nodule": ("nodule(",)})
    with pytest.raises(UserError, match="'nodule' must be a tuple of strings"):
        Lexicon({"nodule": "nodules?"})
    with pytest.raises(UserError, match="denies \\['mass'\\]"):
        Lexicon({"nodule": ("nodule",)}, normal={"clear": ("mass",)})


@pytest.fixture(scope="module")
def described() -> list[dict]:
    source = PhantomSource(Phantoms(num_patients=500, num_captions=3))
    return [source.describe(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def lexicons() -> dict[str, Lexicon]:
    return {
        modality: Lexicon(findings, normal={"no abnormality": tuple(findings)})
        for modality, findings in FINDING_LEXICON.items()
    }


def agreement(pairs: list[tuple[dict, dict]]) -> float:
    """Share of equal statuses among the findings that either side has."""
    equal = [stated.get(name) == true.get(name) for stated, true in pairs for name in {*stated, *true}]
    assert len(equal) > 1000
    return sum(equal) / len(equal)


def test_labels_of_phantom_captions_are_their_statements(described, lexicons):
    pairs = []
    for record in described:
        for text, statements in zip(record["captions"], record["caption_statements"], strict=True):
            true = {s["finding"]: s["presence"] for s in statements if "finding" in s}
            pairs.append((label_text(text, lexicons[record["modality"]]), true))
    assert agreement(pairs) >= 0.99


def test_vague_phantom_captions_state_nothing(lexicons):
    source = PhantomSource(Phantoms(num_patients=60, vague_fraction=1.0))
    for index in range(len(source)):
        record = source.describe(index)
        assert label_texts(record["captions"], lexicons[record["modality"]]) == [{}] * len(record["captions"])


def test_labels_of_phantom_reports_are_the_facts(described, lexicons):
    findings, impressions = [], []
    for record in described:
        facts = {name: fact["presence"] for name, fact in record["facts"]["findings"].items()}
        lexicon = lexicons[record["modality"]]
        findings.append((label_text(record["findings"], lexicon), facts))
        # An impression names what is there, or says that nothing is.
        there = {name: status for name, status in facts.items() if status != "absent"}
        impressions.append((label_text(record["impression"], lexicon), there or facts))
    assert agreement(findings) >= 0.99
    assert agreement(impressions) >= 0.99


STATED = [
    {"nodule": "present", "mass": "absent"},
    {"nodule": "present", "mass": "uncertain"},
    {"mass": "absent"},
]
TRUTH = [
    {"nodule": "present", "mass": "present"},
    {"nodule": "absent", "mass": "present"},
    {"nodule": "uncertain", "mass": "absent"},
]


def test_scores_of_a_small_example_by_hand():
    tables = finding_tables(STATED, TRUTH, ("nodule", "mass"))
    assert tables.shape == (3, 2, 4, 4) and tables.sum() == 6
    assert tables[1, 1, OUTCOMES.index("uncertain"), OUTCOMES.index("present")] == 1
    scores = finding_scores(tables.sum(0))
    # Stated: nodule hit, nodule invented, mass hit (uncertain). True: nodule 2, of them 1 missed; mass 2, 1 missed.
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 4)
    assert scores.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    np.testing.assert_allclose(scores.per_finding_precision, [1 / 2, 1])
    np.testing.assert_allclose(scores.per_finding_recall, [1 / 2, 1 / 2])
    assert scores.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.invented_rate == pytest.approx(1 / 2)
    assert scores.wrong_negation_rate == pytest.approx(1 / 2)


def test_rules_say_how_uncertain_and_unmentioned_count():
    table = finding_tables(STATED, TRUTH, ("nodule", "mass")).sum(0)
    strict = finding_scores(table, FindingRules(uncertain_stated="negative", uncertain_true="ignored"))
    assert strict.precision == pytest.approx(1 / 2)
    assert strict.recall == pytest.approx(1 / 3)
    table = finding_tables([{"nodule": "present"}], [{}], ("nodule",)).sum(0)
    assert math.isnan(finding_scores(table).precision)
    assert finding_scores(table, FindingRules(unmentioned_true="negative")).precision == 0.0
    with pytest.raises(ConfigError, match="uncertain_true must be"):
        FindingRules(uncertain_true="maybe")


def test_what_truth_does_not_mention_is_neither_invented_nor_wrongly_denied():
    names = ("nodule", "mass", "cyst")
    stated = [dict.fromkeys(names, "present"), dict.fromkeys(names, "absent")]
    truth = {"nodule": "present", "mass": "absent"}
    table = finding_tables(stated, [truth, truth], names).sum(0)
    scores = finding_scores(table)
    assert (scores.invented_rate, scores.wrong_negation_rate) == (1 / 2, 1 / 2)
    complete = finding_scores(table, FindingRules(unmentioned_true="negative"))
    assert complete.invented_rate == pytest.approx(2 / 3)
    assert complete.wrong_negation_rate == pytest.approx(1 / 3)
    nothing = finding_scores(finding_tables([{"cyst": "present"}], [{}], names).sum(0))
    assert math.isnan(nothing.invented_rate)


def test_scores_without_any_text_are_undefined():
    scores = finding_scores(finding_tables([], [], ("nodule",)).sum(0))
    assert all(math.isnan(value) for value in (scores.f1, scores.macro_f1, scores.invented_rate))


def test_bad_labels_are_refused():
    with pytest.raises(DataError, match="2 texts but 1 truths"):
        finding_tables([{}, {}], [{}], ("nodule",))
    with pytest.raises(DataError, match="example 0 has 'maybe' for 'nodule'"):
        finding_tables([{"nodule": "maybe"}], [{}], ("nodule",))
    with pytest.raises(DataError, match=r"\[findings, 4, 4\]"):
        finding_scores(np.zeros((2, 4)))
