"""Texts longer than the context: taken apart into pieces, embedded as the weighted mean of the pieces."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import tiny_components

import bvl
from bvl.data.long_texts import split_to_context
from bvl.data.sources import Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import ConfigError
from bvl.evals.retrieval import Retrieval

REPORT = (
    "Small nodule in the left lung. No effusion. The heart is large. "
    "Dr. Example saw 1.5 cm of fluid at the base of the right lung and of the left lung and near the heart. Clear."
)


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request):
    return Tokenizer.train(
        [REPORT] * 3, TokenizerConfig(kind=request.param, vocab_size=400, context_length=16)
    )


@pytest.fixture(scope="module")
def components():
    return tiny_components()


def test_a_text_that_fits_is_one_piece(tokenizer):
    for text in ("", "No effusion.", "No effusion.\n Clear."):
        assert split_to_context(text, tokenizer) == [text]


def test_pieces_are_whole_sentences_where_they_fit(tokenizer):
    pieces = split_to_context(REPORT, tokenizer)
    assert pieces[0] == "Small nodule in the left lung. No effusion."
    assert pieces[1].startswith("The heart is large.")
    assert (
        max(tokenizer.lengths(pieces))
        <= 14
        < min(
            # No two neighbours would have fitted into one, but around the sentence that was cut.
            tokenizer.lengths([" ".join(pair) for pair in zip(pieces, pieces[1:], strict=False)])
        )
    )
    assert " ".join(pieces).split() == REPORT.split()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab. \n,XY", max_size=120))
def test_no_word_is_lost_and_every_piece_fits(text):
    tokenizer = FEW_LETTERS
    pieces = split_to_context(text, tokenizer)
    assert pieces and max(tokenizer.lengths(pieces)) <= tokenizer.context_length - 2
    kept = lambda t: [c for c in t if c.isalnum()]  # noqa: E731
    assert kept("".join(pieces)) == kept(text)


# Every letter is a token, and so is the blank before a word.
FEW_LETTERS = Tokenizer.train(["a"], TokenizerConfig(kind="bpe", vocab_size=261, context_length=5))


def test_a_word_longer_than_the_context_and_punctuation_alone():
    assert split_to_context("a babab. b", FEW_LETTERS) == ["a", "ba", "ba", "b.", "b"]
    assert split_to_context("." * 5, FEW_LETTERS) == ["..", "..", "."]


def test_embedding_is_the_weighted_mean_of_the_pieces(components):
    model = bvl.Model(components)
    room = components.tokenizer.context_length - 2
    report = "A spot at the upper left. A ring in the centre. " * 4
    pieces = split_to_context(report, components.tokenizer)
    lengths = np.asarray(components.tokenizer.lengths(pieces))
    assert len(pieces) > 2 and len(set(lengths)) > 1 and lengths.max() <= room
    mean = (lengths[:, None] * model.embed_texts(pieces)).sum(0)
    texts = ["a spot", report, "a ring"]
    chunks = model.embed_texts(texts, long="chunks", batch_size=4)
    np.testing.assert_allclose(chunks[1], mean / np.linalg.norm(mean), atol=1e-5)
    cut = model.embed_texts(texts)
    np.testing.assert_allclose(chunks[[0, 2]], cut[[0, 2]], atol=1e-5)
    # Cutting sees no difference behind the context, reading in pieces does.
    other = [report + " A bar at the bottom."]
    np.testing.assert_allclose(model.embed_texts(other), cut[1:2], atol=1e-5)
    assert np.abs(model.embed_texts(other, long="chunks") - chunks[1:2]).max() > 1e-3


def test_retrieval_by_long_texts(tmp_path, components):
    """Reports that differ behind the context alone are one to a tower that cuts them."""
    start = "a small spot at the upper left and no ring in the centre and " * 2
    records = []
    for i, end in enumerate("bar cyst calculus ring mass spot lesion nodule".split()):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        records.append({"id": f"r{i}", "image": f"{i}.png", "caption": f"{start} a {end}."})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    suite = Retrieval(source=Source(root=str(tmp_path), split=None))
    cut = suite.run(components, batch_size=4)
    # A tie counts as far down as it can reach.
    assert cut.metrics["i2t_r5"] == 0 and cut.provenance["num_truncated_texts"] == 8
    whole = dataclasses.replace(suite, long_texts="chunks").run(components, batch_size=4)
    assert whole.metrics["i2t_r5"] > 0.2 and whole.provenance["num_truncated_texts"] == 0


def test_cut_texts_are_counted(components, caplog):
    model = bvl.Model(components)
    with caplog.at_level(logging.WARNING):
        model.embed_texts(["a spot", "a ring " * 40], long="chunks")
        assert not caplog.records
        model.embed_texts(["a spot", "a ring " * 40])
    assert "1 of 2 texts are longer than the context of 16 tokens" in caplog.text


def test_no_texts_and_an_unknown_way(components):
    model = bvl.Model(components)
    assert model.embed_texts([], long="chunks").shape == (0, components.model.config.embed_dim)
    with pytest.raises(ConfigError, match="'chunk': .* 'cut' or read in 'chunks'"):
        model.embed_texts(["a"], long="chunk")
