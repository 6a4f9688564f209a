"""Controls: their prefix, their vocabulary entries, and what training shows of a record."""

import collections
import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import PHANTOMS, tiny_config

from bvl.config import with_value
from bvl.data.controls import Controls
from bvl.data.pipeline import DataConfig, Pipeline, training_texts
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.text_choice import ChosenText
from bvl.errors import ConfigError, DataError, UserError
from bvl.runs import RunFolder
from bvl.tasks.base import View
from bvl.train import setup
from bvl.train.setup import load_frozen, prepare_data

TEXTS = ["a small nodule in the left lung", "no nodule and clear lungs", "is there a nodule in the lung"]
ALL = Controls(sections=("captions", "impression"), lengths=9, quality=4, prompt="question", prompt_tokens=6)


def make_tokenizer(controls=ALL, **options):
    options = {"vocab_size": 120, "context_length": 12} | options
    return Tokenizer.train(TEXTS, TokenizerConfig(**options), extra=controls.tokens())


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def read(tokenizer, prefix):
    """The entries of a prefix, "." for padding."""
    ids, mask = prefix
    assert ids.dtype == np.int32 and ids.shape == mask.shape
    assert (ids[~mask] == tokenizer.pad_id).all()
    return " ".join(tokenizer.token(int(i)) if m else "." for i, m in zip(ids, mask, strict=True))


def test_entries_and_slots():
    none = Controls()
    assert none.tokens() == () and none.num_slots == 1 and none.enabled == ()
    assert Controls(sections=("alt_text", "{organ} seen")).tokens() == (
        "[SECTION_ALT_TEXT]",
        "[SECTION_ORGAN_SEEN]",
    )
    assert Controls(lengths=3).tokens() == ("[LENGTH_1]", "[LENGTH_2]", "[LENGTH_3]")
    assert Controls(lengths=(5, 20)).tokens() == ("[LENGTH_5]", "[LENGTH_20]", "[LENGTH_21]")
    assert Controls(quality=2).tokens() == ("[QUALITY_0]", "[QUALITY_1]")
    prompted = Controls(prompt="question", prompt_tokens=6)
    assert prompted.tokens() == ("[PROMPT_END]",) and prompted.num_slots == 1 + 6 + 1
    assert len(ALL.tokens()) == 2 + 9 + 4 + 1 and ALL.num_slots == 1 + 3 + 6 + 1


def test_the_order_is_fixed_and_the_padding_left(tokenizer):
    assert read(tokenizer, ALL.prefix(tokenizer)) == ". . . . . . . . . . [START]"
    everything = ALL.prefix(tokenizer, prompt="a nodule", quality=3, length=7, section="captions")
    assert read(tokenizer, everything) == (
        ". . . . [START] [SECTION_CAPTIONS] [LENGTH_7] [QUALITY_3] a nodule [PROMPT_END]"
    )
    assert read(tokenizer, ALL.prefix(tokenizer, quality=0)) == ". . . . . . . . . [START] [QUALITY_0]"
    full = ALL.prefix(tokenizer, prompt="a a a a a a", quality=0, length=1, section="impression")
    assert full[1].all()
    assert read(tokenizer, Controls().prefix(tokenizer)) == "[START]"


def test_lengths():
    exact, binned = Controls(lengths=9), Controls(lengths=(2, 5))
    words = {n: " ".join("w" * n) for n in (1, 2, 3, 5, 6, 9, 12)}
    assert {n: exact.length_of(w) for n, w in words.items()} == {1: 1, 2: 2, 3: 3, 5: 5, 6: 6, 9: 9, 12: 9}
    assert {n: binned.length_of(w) for n, w in words.items()} == {1: 2, 2: 2, 3: 5, 5: 5, 6: 6, 9: 6, 12: 6}
    tokenizer = make_tokenizer(binned)
    for asked, entry in {1: 2, 2: 2, 4: 5, 6: 6, 40: 6}.items():
        assert read(tokenizer, binned.prefix(tokenizer, length=asked)) == f"[START] [LENGTH_{entry}]"


@pytest.mark.parametrize(
    "given, match",
    [
        ({"section": "caption"}, "section='caption' is unknown, nearest is 'captions'"),
        ({"length": 0}, "length=0: .* from 1 to 9"),
        ({"length": 10}, "length=10"),
        ({"length": 2.5}, "length=2.5"),
        ({"length": True}, "length=True"),
        ({"quality": 4}, r"quality=4: .*0 \(worst\) to 3"),
        ({"quality": -1}, "quality=-1"),
        ({"prompt": " "}, "prompt=' '"),
        ({"prompt": "a nodule in the left lung a"}, "has 7 tokens; .*room for 6.*prompt_tokens"),
    ],
)
def test_bad_values(tokenizer, given, match):
    with pytest.raises(UserError, match=match):
        ALL.prefix(tokenizer, **given)


@pytest.mark.parametrize(
    "name, value, option",
    [
        ("section", "x", "sections"),
        ("length", 3, "lengths"),
        ("quality", 1, "quality"),
        ("prompt", "x", "prompt"),
    ],
)
def test_controls_that_the_run_does_not_have(tokenizer, name, value, option):
    with pytest.raises(UserError, match=f"{name}=.*trained without it.*data.controls.{option} "):
        Controls().prefix(tokenizer, **{name: value})


def test_a_tokenizer_of_another_run_is_noticed():
    with pytest.raises(DataError, match=r"no token \[LENGTH_3\]"):
        ALL.prefix(make_tokenizer(Controls()), length=3)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_vocabulary_grows_at_its_end(kind, tmp_path):
    options = {"kind": kind, "vocab_size": 300}
    plain, grown = make_tokenizer(Controls(), **options), make_tokenizer(**options)
    assert make_tokenizer(Controls(), **options).hash == plain.hash
    assert grown.vocab_size == plain.vocab_size + len(ALL.tokens())
    assert [grown.token(i) for i in range(plain.vocab_size)] == [
        plain.token(i) for i in range(plain.vocab_size)
    ]
    ids = [grown.token_id(name) for name in ALL.tokens()]
    assert ids == list(range(plain.vocab_size, grown.vocab_size))
    assert set(grown.special_ids) == {*plain.special_ids, *ids} and grown.control_ids == set(ids)
    # An entry that stands in a caption is text, and a model that writes one says nothing by it.
    written = "a [LENGTH_7] nodule"
    grown.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json", 12)
    for tokenizer in (grown, loaded, pickle.loads(pickle.dumps(grown)), plain.with_tokens(ALL.tokens())):
        assert tokenizer.control_ids == set(ids)
        np.testing.assert_array_equal(tokenizer.encode(written)[0], plain.encode(written)[0])
        assert not set(tokenizer.ids(written)) & set(ids)
        nodule = tokenizer.ids("nodule")
        assert tokenizer.decode([tokenizer.start_id, ids[3], *nodule, ids[-1]]) == "nodule"
    # What is there already is not added again; what is new goes behind it.
    assert loaded.with_tokens(ALL.tokens()) is loaded
    assert loaded.with_tokens(["[LENGTH_9]", "[LENGTH_10]"]).token_id("[LENGTH_10]") == grown.vocab_size


def test_entries_take_no_id_in_a_gap(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "lung", "lung", "lung", "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    loaded = Tokenizer.load(tmp_path / "vocab.txt", 8).with_tokens(["[LENGTH_1]", "[LENGTH_2]"])
    loaded.save(tmp_path / "tokenizer.json")
    for tokenizer in (loaded, Tokenizer.load(tmp_path / "tokenizer.json", 8)):
        ids = [tokenizer.token_id(name) for name in ("last", "[LENGTH_1]", "[LENGTH_2]")]
        assert ids == [7, 8, 9] and tokenizer.vocab_size == 10 and tokenizer.control_ids == {8, 9}


# -- what training shows ---------------------------------------------------------------------------------------

KEYS = frozenset({"text", "text_mask", "text_valid", "text_id", "prompt", "prompt_mask"})
RECORDS = [
    {
        "id": f"r{i}",
        "captions": ["a nodule", "a small nodule in the lung"],
        "impression": "clear lungs",
        "quality": {"captions": [0, 2], "impression": 3},
        "question": "is there a nodule",
    }
    for i in range(8)
]


def pipeline(tmp_path, controls, records=RECORDS, text=None, keys=KEYS, **options):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = {"captions": 0.5, "impression": 0.5} if text is None else text
    config = DataConfig(
        train=(Source(root=str(tmp_path), split=None, text=text),), controls=controls, **options
    )
    sets = [RecordSet(source) for source in config.sources()]
    return Pipeline(
        config,
        sets=sets,
        keys_of_tasks={"task": keys},
        tokenizer=Tokenizer.train(
            [*TEXTS, *training_texts(sets, controls)],
            TokenizerConfig(vocab_size=120, context_length=8),
            extra=controls.tokens(),
        ),
        classes=(),
        batch_size=8,
        seed=0,
    )


def shown(pipe, steps=8):
    """(text, prefix) of every text of the first batches."""
    tokenizer = pipe.tokenizer
    for batch, _ in pipe.batches(start=0, stop=steps):
        rows = (batch[k].reshape(-1, batch[k].shape[-1]) for k in ("text", "prompt", "prompt_mask"))
        for text, ids, mask in zip(*rows, strict=True):
            yield tokenizer.decode(text), read(tokenizer, (ids, mask)).replace(". ", "")


def test_what_stands_in_front_of_each_text(tmp_path):
    controls = Controls(
        sections=("captions",), lengths=4, quality=4, prompt="question", prompt_tokens=5, dropout=0.0
    )
    pipe = pipeline(tmp_path, controls, texts_per_image=2)
    batch = next(pipe.batches(start=0, stop=1))[0]
    assert batch["prompt"].shape == batch["prompt_mask"].shape == (8, 2, controls.num_slots)
    assert batch["prompt"].dtype == np.int32 and batch["prompt_mask"].dtype == bool
    question = "is there a nodule [PROMPT_END]"
    assert set(shown(pipe)) == {
        ("a nodule", f"[START] [SECTION_CAPTIONS] [LENGTH_2] [QUALITY_0] {question}"),
        # Six words, of which the last token stands for four and more.
        ("a small nodule in the lung", f"[START] [SECTION_CAPTIONS] [LENGTH_4] [QUALITY_2] {question}"),
        ("clear lungs", f"[START] [LENGTH_2] [QUALITY_3] {question}"),
    }


def test_the_length_is_that_of_what_is_shown(tmp_path):
    controls = Controls(lengths=20, dropout=0.0)
    long = {"id": "long", "caption": "lung " * 15, "image": None}
    dropped = pipeline(tmp_path, controls, [long], text="caption", word_dropout=0.7)
    counts = collections.Counter()
    for text, prefix in shown(dropped):
        counts[len(text.split())] += 1
        assert prefix == f"[START] [LENGTH_{len(text.split())}]"
    # With room for six tokens between start and end, more words cannot be shown.
    assert max(counts) == 6 and min(counts) < 5
    cut = pipeline(tmp_path, controls, [long], text="caption")
    assert set(shown(cut, 1)) == {("lung lung lung lung lung lung", "[START] [LENGTH_6]")}


def test_the_length_counts_words_as_a_written_caption_has_them(tmp_path):
    """Splitting at punctuation is not undone everywhere; what training says of a text must hold for the decoded one."""
    controls = Controls(lengths=9, dropout=0.0)
    records = [{"id": text, "caption": text} for text in ("x-ray", "2.5 cm", "clear - no")]
    pipe = pipeline(tmp_path, controls, records, text="caption")
    assert set(shown(pipe)) == {
        ("x-ray", "[START] [LENGTH_1]"),
        ("2. 5 cm", "[START] [LENGTH_3]"),
        ("clear-no", "[START] [LENGTH_1]"),
    }


def test_the_other_keys_stay_as_they_are(tmp_path):
    """Controls are drawn last: what else a run sees does not depend on them."""
    without = pipeline(tmp_path, Controls(), keys=KEYS - {"prompt", "prompt_mask"}, word_dropout=0.3)
    with_controls = pipeline(tmp_path, ALL, word_dropout=0.3)
    for (a, _), (b, _) in zip(
        without.batches(start=0, stop=3), with_controls.batches(start=0, stop=3), strict=True
    ):
        assert b.keys() - a.keys() == {"prompt", "prompt_mask"}
        for key, value in a.items():
            if key not in ("text", "text_mask"):
                np.testing.assert_array_equal(value, b[key], err_msg=key)
        texts = [
            [pipe.tokenizer.decode(row[0]) for row in batch["text"]]
            for pipe, batch in ((without, a), (with_controls, b))
        ]
        assert texts[0] == texts[1]
    again = list(with_controls.batches(start=2, stop=3))[0][0]
    np.testing.assert_array_equal(again["prompt"], b["prompt"])


def test_each_control_is_left_out_at_its_rate(tmp_path):
    controls = Controls(lengths=9, quality=4, prompt="question", prompt_tokens=5, dropout=0.3)
    prefixes = [prefix for _, prefix in shown(pipeline(tmp_path, controls), 60)]
    there = np.array([[name in p for name in ("LENGTH", "QUALITY", "PROMPT")] for p in prefixes])
    assert there.mean(0) == pytest.approx([0.7] * 3, abs=0.07)
    # On their own: as often together as independent ones are.
    assert there.all(1).mean() == pytest.approx(0.7**3, abs=0.07)
    assert all(p.startswith("[START]") for p in prefixes)


def test_a_record_without_a_control_has_none(tmp_path):
    records = [
        {"id": "a", "caption": "a nodule", "quality": {"caption": 1}},
        {"id": "b", "caption": "clear lungs", "question": "is there a nodule"},
        {"id": "c", "caption": "no nodule", "quality": {"findings": 1, "caption": None}},
    ]
    controls = Controls(quality=2, prompt="question", prompt_tokens=3, dropout=0.0)
    pipe = pipeline(tmp_path, controls, records, text="caption", texts_per_image=2)
    assert set(shown(pipe)) == {
        ("a nodule", "[START] [QUALITY_1]"),
        ("clear lungs", "[START] is there a [PROMPT_END]"),
        ("no nodule", "[START]"),
        ("", "[START]"),
    }
    assert pipe.summary()[1:] == [
        "controls: 2 of 3 texts have no quality",
        "controls: 2 of 3 records have no 'question'",
        "controls: 1 of 1 prompts are longer than their room of 3 tokens and are cut (data.controls.prompt_tokens)",
    ]


@pytest.mark.parametrize(
    "controls, record, match",
    [
        (Controls(quality=2), {}, "no text that is read has a quality; `bvl data score`"),
        (Controls(quality=2), {"quality": {"caption": 2}}, "record 'a': .*'caption' is 2, .*bins 0 to 1"),
        (Controls(prompt="question"), {}, "'question', but no record has this field"),
        (Controls(prompt="question"), {"question": 3}, "record 'a': question is 3.*field of strings"),
    ],
)
def test_records_that_do_not_fit(tmp_path, controls, record, match):
    with pytest.raises(DataError, match=match):
        pipeline(tmp_path, controls, [{"id": "a", "caption": "a nodule", **record}], text="caption")


def test_qualities_of_alternatives():
    record = {"id": "a", "quality": {"captions": [0, None], "caption": 3}}
    of = lambda option, i: Controls(quality=4).quality_of(ChosenText("t", option, i), record)  # noqa: E731
    assert [of("captions", 0), of("captions", 1), of("captions", 2), of("caption", 0)] == [0, None, None, 3]
    assert of("findings", 0) is None


@pytest.mark.parametrize(
    "options, match",
    [
        ({"lengths": 1}, "lengths=1"),
        ({"lengths": (5, 5)}, "must rise"),
        ({"lengths": (0, 5)}, "must rise"),
        ({"lengths": ()}, "must rise"),
        ({"quality": 1}, "quality=1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"sections": ("a b", "a-b")}, "share a token"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ConfigError, match=match):
        Controls(**options)


def test_in_a_config():
    with pytest.raises(ConfigError, match="no source reads the text 'finding'; they read caption"):
        DataConfig(controls=Controls(sections=("finding",)))
    config = with_value(DataConfig(), "controls.lengths", "20")
    assert config.controls.lengths == 20
    assert with_value(config, "controls.lengths", "(5, 10)").controls.lengths == (5, 10)


def test_the_tokenizer_of_a_run(tmp_path):
    config = tiny_config(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    controls = Controls(lengths=6, prompt="modality", prompt_tokens=4)
    with_controls = dataclasses.replace(config, data=dataclasses.replace(config.data, controls=controls))
    tokenizer = prepare_data(with_controls, run, None).tokenizer
    assert tokenizer.control_ids == {tokenizer.token_id(name) for name in controls.tokens()}
    # Words of prompts are learned too.
    modality = RecordSet(Source(phantoms=PHANTOMS, split=None)).describe(0)["modality"]
    assert tokenizer.decode(tokenizer.ids(modality)) == modality
    # Kept in the run folder, and there for the next start.
    assert prepare_data(with_controls, run, None).tokenizer.hash == tokenizer.hash


def test_a_frozen_text_tower_needs_no_controls(monkeypatch):
    """What a run adds to the vocabulary of a teacher leaves the ids of its words as they are."""
    teacher = SimpleNamespace(tokenizer=make_tokenizer(Controls()))
    monkeypatch.setattr(setup, "load_components", lambda spec: teacher)
    views = SimpleNamespace(views=lambda: (View("text", encoder="teacher"),))
    config = tiny_config(frozen={"teacher": "runs/teacher"}, tasks={"task": views})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, controls=Controls(lengths=5)))
    grown = make_tokenizer(Controls(lengths=5))
    assert load_frozen(config, grown) == {"teacher": teacher}
    with pytest.raises(ConfigError, match="another vocabulary"):
        load_frozen(config, make_tokenizer(Controls(lengths=5), vocab_size=60))


def test_a_decoder_needs_a_start_token(tokenizer):
    without = Tokenizer(tokenizer._model, 12, start="")
    with pytest.raises(ConfigError, match=r"no start token.*data\.tokenizer\.start"):
        ALL.prefix(without, length=3)
