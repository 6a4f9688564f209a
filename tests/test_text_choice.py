"""Which text of a record is read."""

import collections

import numpy as np
import pytest

from bvl.data.text_choice import TextChoice, drop_words, text_id
from bvl.errors import ConfigError


def test_text_ids_ignore_case_and_spacing():
    assert text_id("Clear  lungs\n") == text_id("clear lungs") != text_id("clear lung")
    assert 0 <= text_id("x") < 2**32


def draws(choice, record, n=4000):
    rng = np.random.default_rng(0)
    counts = collections.Counter(choice.pick(record, rng)[0] for _ in range(n))
    return {text: count / n for text, count in counts.items()}


def test_fields_with_probabilities():
    choice = TextChoice.of({"caption": 0.5, "alt_text": 0.3, "findings": 0.2})
    record = {"caption": "c", "alt_text": "a", "findings": "f"}
    shares = draws(choice, record)
    assert shares == pytest.approx({"c": 0.5, "a": 0.3, "f": 0.2}, abs=0.03)
    # A missing or blank field gives its share to the others in proportion.
    shares = draws(choice, {"caption": "c", "alt_text": "a", "findings": "  "})
    assert shares == pytest.approx({"c": 0.625, "a": 0.375}, abs=0.03)
    assert draws(choice, {"findings": "f", "caption": None}) == {"f": 1.0}
    assert choice.pick({"other": "x"}, np.random.default_rng(0)) == []
    assert choice.first(record) == "c" and choice.first({}) is None
    assert choice.all(record) == ["c", "a", "f"]


def test_alternatives_templates_and_class_prompts():
    shares = draws(TextChoice.of("captions"), {"captions": ["a", "b", "", "c", "d"]})
    assert shares == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}, abs=0.03)
    choice = TextChoice.of("labels", ["an image of {}", "{} with {braces}"])
    assert choice.all({"labels": ["cyst", "mass {x}"]}) == [
        "an image of cyst, mass {x}",
        "cyst, mass {x} with {braces}",
    ]
    assert choice.all({"labels": []}) == choice.all({}) == []
    assert TextChoice.of("labels").all({"labels": ["cyst"]}) == ["cyst"]
    assert TextChoice.of("class_prompt").all({"class_prompt": "a hand X-ray"}) == ["a hand X-ray"]


def test_fields_that_hold_no_text_are_absent():
    for value in (43, {"a": "b"}, [1, 2], True):
        assert TextChoice.of("age").all({"age": value}) == []


def test_several_texts_are_different_texts():
    rng = np.random.default_rng(0)
    choice = TextChoice.of({"caption": 0.9, "alt_text": 0.1})
    record = {"caption": "c", "alt_text": "a"}
    for _ in range(20):
        assert sorted(choice.pick(record, rng, 2)) == ["a", "c"]
        assert sorted(choice.pick(record, rng, 4)) == ["a", "c"]
    assert choice.pick({"caption": "c"}, rng, 3) == ["c"]
    assert choice.pick({"caption": "Same text", "alt_text": "same  text"}, rng, 2)[0].lower() == "same text"
    assert len(choice.pick({"caption": "Same text", "alt_text": "same  text"}, rng, 2)) == 1
    many = {"caption": ["1", "2", "3"], "alt_text": "a"}
    for _ in range(20):
        assert sorted(TextChoice.of("caption").pick(many, rng, 3)) == ["1", "2", "3"]
        three = choice.pick(many, rng, 3)
        assert "a" in three and len(set(three)) == 3
        assert sorted(choice.pick(many, rng, 9)) == ["1", "2", "3", "a"]


def test_one_text_is_drawn_as_it_always_was():
    """Runs that were begun earlier go on with the same texts."""
    choice = TextChoice.of({"caption": 0.5, "alt_text": 0.3, "findings": 0.2})
    record = {"caption": ["1", "2", "3"], "alt_text": "a", "findings": ["x", "y"]}
    drawn = [choice.pick(record, np.random.default_rng(i))[0] for i in range(12)]
    assert "".join(drawn) == "aa11yxaa1yx3"


def test_templates_over_fields():
    choice = TextChoice.of({"a photo of {finding}": 0.2, "{modality}, {finding} in the {location}": 0.8})
    record = {"modality": "CT", "finding": "cyst", "location": "kidney {left}"}
    both = ["a photo of cyst", "CT, cyst in the kidney {left}"]
    assert choice.all(record) == both and choice.first(record) == both[1]
    assert draws(choice, record) == pytest.approx({both[0]: 0.2, both[1]: 0.8}, abs=0.03)
    for location in (None, "", " ", [], True, {"a": "b"}, ["x", None]):
        assert choice.all({**record, "location": location}) == both[:1]
    assert choice.all({"modality": "CT"}) == []
    taxonomy = TextChoice.of("{taxonomy}, {age} years")
    assert taxonomy.all({"taxonomy": ["Animalia", "Aves"], "age": 3}) == ["Animalia, Aves, 3 years"]
    assert TextChoice.of("shows {labels}").all({"labels": ["cyst", "mass"]}) == ["shows cyst, mass"]
    assert TextChoice.of("shows {labels}").all({"labels": []}) == []


DESCRIPTIONS = {"cyst": ("round and dark", "filled with fluid"), "mass": ("solid",)}


def test_spaces_within_braces_mean_nothing():
    choice = TextChoice.of("{ modality } of { labels }", descriptions={"cyst": ["a sac"]})
    assert choice.reads_labels() and choice.first({"modality": "CT", "labels": ["cyst"]}) == "CT of a sac"


def test_descriptions_of_labels():
    choice = TextChoice.of("labels", ("{}", "an image: {}"), descriptions=DESCRIPTIONS)
    record = {"labels": ["cyst", "mass", "stone"]}
    ends = ["round and dark, solid, stone", "filled with fluid, solid, stone"]
    every = [ends[0], f"an image: {ends[0]}", ends[1], f"an image: {ends[1]}"]
    assert choice.all(record) == every
    assert draws(choice, record) == pytest.approx(dict.fromkeys(every, 0.25), abs=0.03)
    assert choice.first(record) == ends[0] and choice.for_evaluation(record) == every[:2]
    in_template = TextChoice.of("seen: {labels}", descriptions=DESCRIPTIONS)
    assert in_template.all({"labels": ["cyst"]}) == ["seen: round and dark", "seen: filled with fluid"]
    assert choice.all({"labels": []}) == [] and not choice.offers({"labels": []})
    # Names in other fields are not labels.
    assert TextChoice.of("name", descriptions=DESCRIPTIONS).all({"name": "cyst"}) == ["cyst"]


def test_one_sentence():
    choice = TextChoice.of({"findings": 0.5, "caption": 0.5}, sentences="one")
    record = {"findings": "Clear lungs. Heart of 1.5 cm. No mass.", "caption": "A scan."}
    assert choice.all(record) == ["Clear lungs.", "Heart of 1.5 cm.", "No mass.", "A scan."]
    shares = draws(choice, record)
    assert shares == pytest.approx({"A scan.": 0.5} | dict.fromkeys(choice.all(record)[:3], 1 / 6), abs=0.03)
    assert choice.for_evaluation(record) == [record["findings"], "A scan."]
    two = TextChoice.of("findings", sentences="one").pick(record, np.random.default_rng(0), 2)
    assert len(set(two)) == 2 and set(two) < set(choice.all(record))
    assert TextChoice.of("caption", sentences="one").all({"caption": "..."}) == ["..."]


def test_texts_for_evaluation():
    choice = TextChoice.of({"alt_text": 0.2, "caption": 0.8})
    record = {"alt_text": "an A", "caption": ["a  B", "a b", "a c"]}
    assert choice.for_evaluation(record) == ["a  B", "a c", "an A"]
    assert choice.first(record) == "a  B" and choice.for_evaluation({}) == []


def test_dropped_words():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(10)]
    drawn = [drop_words(" ".join(words), 0.3, rng).split() for _ in range(1000)]
    counts = collections.Counter(word for kept in drawn for word in kept)
    assert all(counts[word] / 1000 == pytest.approx(0.7, abs=0.06) for word in words)
    assert all(kept == sorted(kept, key=words.index) for kept in drawn)
    # Some word is always left, each as often as the other.
    short = collections.Counter(drop_words("a b", 0.999, rng) for _ in range(1000))
    assert short["a"] + short["b"] >= 990 and min(short["a"], short["b"]) > 400
    assert drop_words("", 0.5, rng) == ""


def test_picks_depend_on_the_generator_alone():
    choice = TextChoice.of({"caption": 0.5, "alt_text": 0.5})
    record = {"caption": ["1", "2", "3"], "alt_text": "a"}
    runs = [[choice.pick(record, np.random.default_rng(i), 2) for i in range(30)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert record["caption"] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "text, options, match",
    [
        ({}, {}, "above 0"),
        ({"caption": 0.0}, {}, "above 0"),
        ({"caption": -1.0, "x": 1.0}, {}, "above 0"),
        ("labels", {"templates": ("no place",)}, "no '{}'"),
        ("a photo of {}", {}, "name of a field"),
        ("a photo of {finding", {}, "name of a field"),
        ("a photo of }finding{", {}, "name of a field"),
        ("labels", {"descriptions": {"cyst": ()}}, "one or more texts"),
        ("labels", {"descriptions": {"cyst": "dark"}}, "one or more texts"),
        ("caption", {"sentences": "two"}, "'all' or 'one'"),
    ],
)
def test_bad_choices(text, options, match):
    with pytest.raises(ConfigError, match=match):
        TextChoice.of(text, **options)


def test_where_a_text_came_from():
    choice = TextChoice.of({"captions": 0.6, "{organ} seen": 0.3, "labels": 0.1}, ["{} here", "some {}"])
    record = {"captions": ["", "first", 3, "second"], "organ": "lung", "labels": ["cyst"]}
    origins = {
        "first": ("captions", 1),
        "second": ("captions", 3),
        "lung seen": ("{organ} seen", 0),
        "cyst here": ("labels", 0),
        "some cyst": ("labels", 1),
    }
    assert {c.text: (c.option, c.alternative) for c in choice.in_order(record)} == origins
    assert choice.for_evaluation(record) == list(origins)
    drawn = choice.draw(record, np.random.default_rng(3), 5)
    assert {c.text: (c.option, c.alternative) for c in drawn} == origins
    assert [c.text for c in drawn] == choice.pick(record, np.random.default_rng(3), 5)
    one = TextChoice.of("captions", sentences="one")
    chosen = one.draw({"captions": ["A b.", "C d. E f."]}, np.random.default_rng(0), 3)
    assert sorted((c.text, c.alternative) for c in chosen) == [("A b.", 0), ("C d.", 1), ("E f.", 1)]
