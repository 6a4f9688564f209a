"""Caption metrics on words against pycocoevalcap's values, hand-computed ones and naive twins."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.bleu import bleu, bleu_statistics
from bvl.metrics.bootstrap import bootstrap_interval, bootstrap_sums
from bvl.metrics.caption_text import (
    distinct_n,
    length_error,
    length_obeyed,
    num_words,
    tokenize,
    unique_share,
)
from bvl.metrics.cider import DocumentFrequencies, cider_d, document_frequencies
from bvl.metrics.rouge import rouge_l

GOLDEN = json.loads((Path(__file__).parent / "golden" / "pycocoevalcap.json").read_text(encoding="utf-8"))
HYPOTHESES = [row["hypothesis"].split() for row in GOLDEN["captions"]]
REFERENCES = [[text.split() for text in row["references"]] for row in GOLDEN["captions"]]


def ours() -> dict[str, np.ndarray]:
    statistics = bleu_statistics(HYPOTHESES, REFERENCES)
    rouge, cider = rouge_l(HYPOTHESES, REFERENCES), cider_d(HYPOTHESES, REFERENCES)
    return {
        "bleu": bleu(statistics),
        "rouge_l": rouge,
        "cider_d": cider,
        "corpus/bleu": bleu(statistics.sum(0)),
        "corpus/rouge_l": rouge.mean(),
        "corpus/cider_d": cider.mean(),
    }


def assert_equal(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-9, rtol=1e-9, err_msg=name)


def test_values_equal_the_stored_ones_of_pycocoevalcap():
    rows = GOLDEN["captions"]
    expected = {name: np.array([row[name] for row in rows]) for name in ("bleu", "rouge_l", "cider_d")}
    expected |= {f"corpus/{name}": value for name, value in GOLDEN["corpus"].items()}
    assert_equal(ours(), expected)
    # The set would notice a constant: there are worst, best and middling captions.
    for name in ("rouge_l", "cider_d"):
        assert expected[name].min() == 0 and len(np.unique(expected[name].round(6))) > 20
    assert expected["cider_d"].max() == pytest.approx(10)


def test_values_equal_those_of_the_installed_pycocoevalcap():
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = {i: row["references"] for i, row in enumerate(GOLDEN["captions"])}
    hypotheses = {i: [row["hypothesis"]] for i, row in enumerate(GOLDEN["captions"])}
    expected = {}
    expected["corpus/bleu"], by_n = bleu_module.Bleu(4).compute_score(references, hypotheses, verbose=0)
    expected["bleu"] = np.array(by_n).T
    expected["corpus/rouge_l"], expected["rouge_l"] = Rouge().compute_score(references, hypotheses)
    expected["corpus/cider_d"], expected["cider_d"] = Cider().compute_score(references, hypotheses)
    assert_equal(ours(), expected)


# --- BLEU


def test_bleu_by_hand():
    # "the" is matched twice of 7, as in Papineni et al., example 2.
    row = bleu_statistics(["the the the the the the the".split()], [["the cat is on the mat".split()]])[0]
    assert row.tolist() == [7, 6, 2, 0, 0, 0, 7, 6, 5, 4]
    assert bleu(row)[0] == pytest.approx(2 / 7)
    # Of two references as close as each other the shorter counts: 3 words against 2 and 4.
    assert bleu_statistics([list("abc")], [[list("abcd"), list("ab")]])[0, 1] == 2
    # 2 of 2 words and 1 of 1 bigram, brevity exp(1 - 4/2).
    short = bleu(bleu_statistics([list("ab")], [[list("abcd")]], max_n=2)[0])
    np.testing.assert_allclose(short, [math.exp(-1)] * 2, rtol=1e-6)
    np.testing.assert_allclose(bleu(bleu_statistics([list("abcde")], [[list("abcde")]])), 1, rtol=1e-6)


def test_bleu_of_a_corpus_is_of_the_sums_and_its_interval_resamples_them():
    statistics = bleu_statistics(HYPOTHESES, REFERENCES)
    assert abs(bleu(statistics.sum(0))[3] - bleu(statistics)[:, 3].mean()) > 0.01
    groups = [i // 2 for i in range(len(statistics))]
    by_sums = bootstrap_sums(statistics, lambda sums: bleu(sums)[3], groups, num_samples=50)
    by_rows = bootstrap_interval(lambda rows: bleu(statistics[rows].sum(0))[3], groups, num_samples=50)
    assert (by_sums.low, by_sums.high) == pytest.approx((by_rows.low, by_rows.high))
    assert by_sums.low < bleu(statistics.sum(0))[3] < by_sums.high and by_sums.num_groups == 22


# --- ROUGE-L


def naive_common_subsequence(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + naive_common_subsequence(a[:-1], b[:-1])
    return max(naive_common_subsequence(a[:-1], b), naive_common_subsequence(a, b[:-1]))


def test_rouge_equals_its_definition_on_random_words():
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = (rng.choice(list("abc"), rng.integers(1, 8)).tolist() for _ in range(2))
        common = naive_common_subsequence(a, b)
        p, r = common / len(a), common / len(b)
        expected = (1 + 1.44) * p * r / (r + 1.44 * p) if common else 0
        assert rouge_l([a], [[b]])[0] == pytest.approx(expected)


def test_rouge_by_hand():
    # The subsequence a c d: P = 3/4, R = 3/5, with beta 1 the harmonic mean.
    assert rouge_l([list("abcd")], [[list("xacyd")]], beta=1)[0] == pytest.approx(2 / (4 / 3 + 5 / 3))
    # The greatest P comes from the long reference, the greatest R from the short one.
    assert rouge_l([list("ab")], [[list("a"), list("xabx")]])[0] == pytest.approx(1)
    assert rouge_l([[], []], [[[]], [list("a")]]).tolist() == [1, 0]


# --- CIDEr-D


def test_cider_by_hand():
    # Two images; every word is in one of them, so every n-gram weighs log 2 and cosines are those of counts.
    one, two = list("abcd"), list("efgh")
    assert cider_d([one, two], [[one], [two]]) == pytest.approx([10, 10])
    # a b x y against a b c d: 2 of 4 words and 1 of 3 bigrams match; the new words weigh log 2 as well.
    mixed = cider_d([list("abxy"), two], [[one], [two]])
    assert mixed[0] == pytest.approx(10 / 4 * (2 / 4 + 1 / 3))
    # Three words less: the Gaussian of the difference in length.
    short = cider_d([["a"], two], [[one], [two]], sigma=2)
    assert short[0] == pytest.approx(10 / 4 * (1 / math.sqrt(4)) * math.exp(-9 / 8))
    # Repeating a word is clipped to its count in the reference: 1 over norms 2 x 2.
    assert cider_d([list("aaaa"), two], [[one], [two]], max_n=1)[0] == pytest.approx(10 * 1 / (4 * 2))
    # A word of every image weighs nothing.
    assert cider_d([["a"], ["a"]], [[["a"]], [["a"]]]).tolist() == [0, 0]


def test_cider_with_given_frequencies_scores_a_part_as_in_the_whole():
    whole = cider_d(HYPOTHESES, REFERENCES)
    frequencies = document_frequencies(REFERENCES)
    part = cider_d(HYPOTHESES[3:5], REFERENCES[3:5], frequencies=frequencies)
    np.testing.assert_allclose(part, whole[3:5], rtol=1e-12)
    assert not np.allclose(cider_d(HYPOTHESES[3:5], REFERENCES[3:5]), whole[3:5])
    assert cider_d(HYPOTHESES[7:8], REFERENCES[7:8]).tolist() == [0]
    with pytest.raises(DataError, match="num_documents=1"):
        DocumentFrequencies({("a",): 2}, 1)


# --- words


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("No right-sided pneumothorax.", "no right-sided pneumothorax"),
        ("T2-weighted MRI: L4/L5 disc, 1,200 ms; 3.5 cm.", "t2-weighted mri l4/l5 disc 1,200 ms 3.5 cm"),
        ("The patient's lungs aren't clear", "the patient 's lungs are n't clear"),
        ("It cannot be excluded... (see AP/PA view)", "it can not be excluded see ap/pa view"),
        ("<5 mm, >50% at 37°C", "< 5 mm > 50 % at 37 ° c"),
        ("tightness.The heart,lungs -- “normal”", "tightness the heart lungs normal"),
        ("e.g. in the U.S. at 10:30, of .5 cm", "e.g in the u.s at 10:30 of .5 cm"),
        ("patients’ ‘old’ o'clock it’s", "patients old o'clock it 's"),
        ("H&E stain & ½ µm ﬁbers", "h&e stain & 1/2 μm fibers"),
        ("a_b __ _c", "a_b c"),
        (" \n", ""),
    ],
)
def test_tokens(text, tokens):
    assert tokenize(text) == tokens.split()
    # Tokens are themselves; so text that was tokenized before keeps its words.
    assert tokenize(" ".join(tokenize(text))) == tokens.split() or "'" in tokens


def test_lengths_are_counted_by_white_space():
    texts = ["a small, round nodule", "", "two  words\n"]
    assert [num_words(text) for text in texts] == [4, 0, 2]
    asked = np.array([5, 3, np.nan])
    np.testing.assert_array_equal(length_error(asked, texts), [-1, -3, np.nan])
    np.testing.assert_array_equal(length_obeyed(asked, texts), [1, 0, np.nan])
    np.testing.assert_array_equal(length_obeyed(asked, texts, tolerance=3), [1, 1, np.nan])
    with pytest.raises(DataError, match="3 captions"):
        length_error(np.array([5.0]), texts)


def test_diversity_by_hand():
    captions = [list("aab"), list("aab"), ["c"], []]
    assert distinct_n(captions, 1) == 3 / 7
    assert distinct_n(captions, 2) == 2 / 4
    assert distinct_n(captions, 3) == 1 / 2
    assert math.isnan(distinct_n(captions, 4)) and math.isnan(unique_share([]))
    assert unique_share(captions) == 3 / 4
    with pytest.raises(DataError, match="n=0"):
        distinct_n(captions, 0)


@pytest.mark.parametrize("score", [bleu_statistics, rouge_l, cider_d])
def test_what_is_no_list_of_tokens_is_refused(score):
    with pytest.raises(DataError, match="tokenize"):
        score(["a caption"], [[["a"]]])
    with pytest.raises(DataError, match="tokenize"):
        score([["a"]], [["a caption"]])
    with pytest.raises(DataError, match="hypothesis 1 needs"):
        score([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(DataError, match="2 hypotheses but references for 1"):
        score([["a"], ["b"]], [[["a"]]])
    assert len(score([], [])) == 0
