"""Tokenizers."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from bvl.data.text import MASK, PAD, START, Tokenizer, TokenizerConfig
from bvl.errors import ConfigError, DataError

TEXTS = [
    "Small nodule in the left lung.",
    "No nodule; the lungs are clear.",
    "Heart size is normal, lungs clear.",
    "Left-sided effusion of moderate size.",
]
# Many words of equal frequency: what is tied must still come out in one order.
TIES = [f"finding{a}{b} near {b}{a}" for a in "abcdefgh" for b in "jklmnopq"]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request):
    return Tokenizer.train(TEXTS, TokenizerConfig(kind=request.param, vocab_size=400, context_length=16))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_the_same_in_every_process(kind, tmp_path):
    code = (
        "import sys; from pathlib import Path; from bvl.data.text import *\n"
        f"texts = {TEXTS + TIES!r}\n"
        f"Tokenizer.train(texts, TokenizerConfig(kind={kind!r}, vocab_size=420)).save(Path(sys.argv[1]))"
    )
    files = [tmp_path / name for name in ("a", "b", "c")]
    for i, file in enumerate(files[:2]):
        environment = {"PYTHONHASHSEED": str(i + 1), "RAYON_NUM_THREADS": str(i + 1)}
        subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True)
    trained = Tokenizer.train(TEXTS + TIES, TokenizerConfig(kind=kind, vocab_size=420))
    trained.save(files[2])
    assert len({file.read_bytes() for file in files}) == 1


def test_encode_and_decode(tokenizer):
    tokens, mask, truncated = tokenizer.encode(TEXTS[0])
    used = int(mask.sum())
    assert tokens.shape == mask.shape == (16,) and tokens.dtype == np.int32
    assert tokens[0] == tokenizer.start_id and tokens[used - 1] == tokenizer.end_id
    assert (tokens[used:] == tokenizer.pad_id).all() and mask[:used].all() and not truncated
    assert tokenizer.decode(tokens).replace(" .", ".") == TEXTS[0].lower()
    # What stands behind the end token is not read.
    tokens[used:] = tokens[1]
    assert tokenizer.decode(tokens).replace(" .", ".") == TEXTS[0].lower()


def test_words_with_hyphens_and_numbers_stay_whole():
    """The length of a caption is counted in words: "x-ray" is one."""
    text = "chest x-ray with a mixed-echo mass (see arrow), 2 cm; 30% of the patient's lung and/or liver."
    made = Tokenizer.train([text], TokenizerConfig(vocab_size=300))
    assert made.decode(made.encode(text)[0]) == text
    for two in ("no cyst. there is a stone.", "grade 2. 3 nodules."):
        made = Tokenizer.train([two], TokenizerConfig(vocab_size=300))
        assert made.decode(made.encode(two)[0]) == two == made.as_shown(two)


def test_a_text_as_shown_ends_with_the_context():
    made = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=400, context_length=5))
    assert made.as_shown("Left-sided effusion of moderate size") == "left-sided"
    assert made.unknown_id == made.token_id("[UNK]")


@pytest.mark.parametrize("name, found", [("<unk>", 4), ("<|unk|>", 4), ("[PAD]", None)])
def test_the_unknown_token_of_a_loaded_vocabulary(tmp_path, name, found):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "lung": 3, name: 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=name))
    assert Tokenizer(model, 8).unknown_id == found


def test_bpe_decodes_what_it_never_saw():
    bpe = Tokenizer.train(TEXTS, TokenizerConfig(kind="bpe", vocab_size=300, lowercase=False))
    text = "Ödem, 3 µm — 肺 CT: T1w/T2w"
    assert bpe.decode(bpe.encode(text)[0]) == "Ödem, 3 μm — 肺 CT: T1w/T2w"  # NFKC makes the micro sign a mu


def test_truncation_keeps_the_end_token_and_is_counted(tokenizer):
    room = tokenizer.context_length - 2
    word = "nodule "
    texts = [word * n for n in (1, room, room + 1, 100)]
    lengths = [len(tokenizer._model.encode(t, add_special_tokens=False).ids) for t in texts]
    expected = [length > room for length in lengths]
    assert expected[0] is False and expected[3] is True
    encoded = [tokenizer.encode(t) for t in texts]
    assert [truncated for _, _, truncated in encoded] == expected
    assert tokenizer.lengths(texts) == lengths
    assert tokenizer.count_truncated(texts) == sum(expected)
    tokens, mask, _ = encoded[3]
    assert mask.all() and tokens[-1] == tokenizer.end_id and tokens[0] == tokenizer.start_id


def test_special_tokens_in_a_text_are_text(tokenizer):
    tokens, mask, _ = tokenizer.encode(f"a {PAD} b [END] c {START} {MASK}")
    inside = tokens[1 : int(mask.sum()) - 1]
    special = {tokenizer.end_id, tokenizer.pad_id, tokenizer.start_id, tokenizer.mask_id}
    assert len(special) == 4 and not special & set(inside.tolist())


def test_a_worker_process_reads_texts_alike(tokenizer):
    text = f"a {PAD} b [END] c"
    sent = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(sent.encode(text)[0], tokenizer.encode(text)[0])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json", 16)
    assert again.hash == tokenizer.hash and again.vocab_size == tokenizer.vocab_size
    for text in [*TEXTS, "unseen words [END]"]:
        np.testing.assert_array_equal(again.encode(text)[0], tokenizer.encode(text)[0])
    other = Tokenizer.train(TEXTS[:2], TokenizerConfig(vocab_size=400))
    assert other.hash != tokenizer.hash


@pytest.fixture(scope="module")
def clip_like():
    """A vocabulary whose tokens of these roles have names of their own."""
    vocab = {"!": 0, "lung": 1, "clear": 2, "<bos>": 3, "<eot>": 4, "<unk>": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return model


def test_special_tokens_by_name(clip_like, tmp_path):
    clip_like.save(str(tmp_path / "tokenizer.json"))
    roles = {"start": "<bos>", "end": "<eot>", "pad": "!"}
    options = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), context_length=5, **roles)
    tokenizer = Tokenizer.of(options.path, options)
    assert tokenizer.encode("lung clear")[0].tolist() == [3, 1, 2, 4, 0] and tokenizer.room == 3
    assert tokenizer.encode("lung " * 9)[0].tolist() == [3, 1, 1, 1, 4]
    assert tokenizer.decode([3, 1, 2, 4, 1]) == "lung clear"
    with pytest.raises(DataError, match=r"no start token; .*data\.tokenizer\.start"):
        Tokenizer.load(options.path, 5)
    with pytest.raises(DataError, match="looked for <missing>"):
        Tokenizer.load(options.path, 5, **{**roles, "pad": "<missing>"})
    # Another padding token gives other ids, so it is another tokenizer.
    assert tokenizer.hash != Tokenizer.load(options.path, 5, start="<bos>", end="<eot>", pad="<eot>").hash


def test_no_start_token(clip_like):
    tokenizer = Tokenizer(clip_like, 3, start="", end="<eot>", pad="<eot>")
    for made in (tokenizer, tokenizer.with_tokens(["[LENGTH_1]"]), tokenizer.with_context(4).with_context(3)):
        assert made.start_id is None and made.room == 2
        assert made.encode("lung")[0].tolist() == [1, 4, 4]
        assert made.encode("lung clear lung")[0].tolist() == [1, 2, 4]
        assert made.as_shown("lung clear lung") == "lung clear"
        assert made.count_truncated(["lung clear", "lung clear lung"]) == 1
    assert tokenizer.with_tokens(["[LENGTH_1]"]).special_ids == (4, 6)
    assert tokenizer.hash == tokenizer.with_context(9).hash


def test_one_token_may_begin_and_end_a_text(clip_like):
    tokenizer = Tokenizer(clip_like, 6, start="<eot>", end="<eot>", pad="!")
    assert tokenizer.encode("lung clear")[0].tolist() == [4, 1, 2, 4, 0, 0]
    assert tokenizer.decode(tokenizer.encode("lung clear")[0]) == "lung clear"
    # Written texts have no start; an empty one is padding behind its end.
    assert tokenizer.decode([1, 4, 2]) == "lung" and tokenizer.decode([4, 0, 0]) == ""


def test_usual_names_given_as_options_change_no_hash(tokenizer):
    given = Tokenizer(tokenizer._model, 16, start=START, end="[END]", pad=PAD)
    assert given.hash == tokenizer.hash


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "lung", "##s", "clear", "Lung", ",", "é"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_vocab_txt(tmp_path, ending):
    path = tmp_path / "vocab.txt"
    path.write_bytes((ending.join(VOCAB) + ending).encode())
    uncased = Tokenizer.load(path, 8)
    assert uncased.vocab_size == len(VOCAB) and uncased.mask_id is None
    tokens, mask, _ = uncased.encode("Lungs, clear stone")
    assert [VOCAB[i] for i in tokens] == "[CLS] lung ##s , clear [UNK] [SEP] [PAD]".split()
    assert mask.tolist() == [True] * 7 + [False]
    cased = Tokenizer.load(path, 8, lowercase=False)
    assert VOCAB[cased.encode("Lung")[0][1]] == "Lung"
    assert cased.decode(cased.encode("Lungs clear")[0]) == "Lungs clear"


@pytest.mark.parametrize("name", ["[MASK]", "<mask>"])
def test_the_mask_token_of_a_loaded_vocabulary(tmp_path, name):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCAB, name]) + "\n", encoding="utf-8")
    assert Tokenizer.load(path, 8).mask_id == len(VOCAB)


def test_vocab_txt_with_a_separator_as_a_token(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCAB, "\u2028", "last"]) + "\n", encoding="utf-8")
    assert Tokenizer.load(path, 8).encode("last")[0][1] == len(VOCAB) + 1


def test_a_repeated_token_leaves_a_gap_but_no_id_outside(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCAB[:-1], "lung", "last"]) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(path, 8)
    assert tokenizer.encode("last")[0][1] == 10 == tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "is not a tokenizer.json"),
        ("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\nlung\n", r"no token \[UNK\]"),
        ("vocab.txt", b"[PAD]\n[UNK]\nlung\n", "no start token"),
        ("vocab.txt", b"[PAD]\n[UNK]\nl\xfcng\n", "not UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        Tokenizer.load(tmp_path / name, 8)


def test_nothing_to_train_on():
    for kind in ("wordpiece", "bpe"):
        with pytest.raises(DataError, match="empty"):
            Tokenizer.train(["", "  "], TokenizerConfig(kind=kind, vocab_size=300))
    with pytest.raises(DataError, match="no tokenizer file"):
        Tokenizer.load("nowhere/tokenizer.json", 8)


@pytest.mark.parametrize(
    "options",
    [
        {"context_length": 2},
        {"vocab_size": 4},
        {"kind": "bpe", "vocab_size": 100},
        {"end": ""},
        {"pad": ""},
        {"embedding_rows": 0},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        TokenizerConfig(**options)
