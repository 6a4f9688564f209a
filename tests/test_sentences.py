"""Splitting texts into sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvl.data.sentences import split_sentences


@pytest.mark.parametrize(
    "text",
    [
        "A nodule of 1.5 cm in the left lung.",
        "Seen by Dr. Moe, e.g. for cough, approx. 3 days ago.",
        "Right vs. left, cf. Fig. 3 and Fig. B, i.e. both.",
        "See image no. 5 of series no. 2.",
        "Read by J. Doe and K. L. Poe.",
        "Photograph by Jane F. Doe, cropped.",
        "The pt. denies pain, temp. 37.2, 5 mg p.o. daily.",
        "Growth (approx. 2 mm.) since then.",
        "no stop at the end, version 2.0",
        "1. Clear lungs.",
        "Well ... perhaps stable.",
        'He said "no." and left.',
        "Smith et al. report this.",
    ],
)
def test_one_sentence(text):
    assert split_sentences(text) == [text]


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Clear lungs. No effusion!  Why? Unknown…", ["Clear lungs.", "No effusion!", "Why?", "Unknown…"]),
        ("the lungs are clear. the heart is normal.", ["the lungs are clear.", "the heart is normal."]),
        (
            "XXXX and lateral views. XXXX XXXX. Heart normal.",
            ["XXXX and lateral views.", "XXXX XXXX.", "Heart normal."],
        ),
        ("Seen by Dr. XXXX. Stable.", ["Seen by Dr. XXXX.", "Stable."]),
        ("Size 1.5 cm. Was 2.0.", ["Size 1.5 cm.", "Was 2.0."]),
        ("1. Clear lungs. 2. No effusion.", ["1. Clear lungs.", "2. No effusion."]),
        ("Well. IMPRESSION: 1. Clear lungs. 2. Mass.", ["Well.", "IMPRESSION: 1. Clear lungs.", "2. Mass."]),
        ("Grade: 3. BI-RADS: 1. Next", ["Grade: 3.", "BI-RADS: 1.", "Next"]),
        ("Findings:\n- one\n- two\n\nEnd", ["Findings:", "- one", "- two", "End"]),
        ("A line\nthat is broken. Next", ["A line that is broken.", "Next"]),
        ("Acute hepatitis B. No fever.", ["Acute hepatitis B.", "No fever."]),
        ("Vitamin K. Then more.", ["Vitamin K.", "Then more."]),
        ("Pain? no. The rest is well.", ["Pain?", "no.", "The rest is well."]),
        ("Cells, vessels, etc. The stain is blue.", ["Cells, vessels, etc.", "The stain is blue."]),
        ("It grew (see above.) Then it shrank.", ["It grew (see above.)", "Then it shrank."]),
        (". XXXX . .", ["XXXX ."]),
        ("  \n ", []),
        ("", []),
    ],
)
def test_several_sentences(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text(alphabet='aB1.?! \n("e', max_size=60))
def test_nothing_is_lost_but_spaces_and_lone_stops(text):
    sentences = split_sentences(text)
    kept = [c for sentence in sentences for c in sentence if c.isalnum()]
    assert kept == [c for c in text if c.isalnum()]
    assert all(s == " ".join(s.split()) and any(c.isalnum() for c in s) for s in sentences)
