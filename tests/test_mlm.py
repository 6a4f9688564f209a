"""Masked language modelling: which words are hidden, the loss against loops, and what it learns."""

import collections
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation, metric_rows, tiny_config  # noqa: F401

from bvl.data.phantoms import Phantoms, PhantomSource
from bvl.data.pipeline import training_texts
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import ConfigError
from bvl.models.bert import BertConfig
from bvl.models.features import TextFeatures
from bvl.models.text import TextConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import load_components
from bvl.tasks.base import ModelInfo
from bvl.tasks.contrastive import Contrastive, embed_texts
from bvl.tasks.mlm import MaskedLanguageModel
from bvl.train.loop import train
from bvl.train.optim import OptimConfig

PAD, START, END, MASK, VOCAB = 0, 1, 2, 3, 50
INFO = ModelInfo(8, 8, 8, (), vocab_size=VOCAB, mask_id=MASK, special_ids=(PAD, START, END))


def a_batch(rows=64, length=40, seed=0):
    """Texts of 0 to `length` - 2 words, two an image."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, length - 1, (rows, 2))
    place = np.arange(length)
    text = np.where(place <= words[..., None], rng.integers(4, VOCAB, (rows, 2, length)), PAD)
    text[..., 0] = START
    np.put_along_axis(text, words[..., None] + 1, END, -1)
    return {"text": jnp.asarray(text), "text_mask": jnp.asarray(place <= words[..., None] + 1),
            "text_valid": jnp.asarray(rng.random((rows, 2)) < 0.9)}, words  # fmt: skip


TASK = MaskedLanguageModel(mask_fraction=0.4)
COMPILED = jax.jit(lambda batch, keys: TASK.prepare(batch, keys, INFO))


def prepare(batch, seed=0):
    return jax.device_get(COMPILED(batch, jax.random.split(jax.random.key(seed), len(batch["text"]))))


def test_which_words_are_hidden():
    batch, words = a_batch()
    out = prepare(batch)
    text, before, chosen = out["mlm/text"], batch["text"], out["mlm/chosen"]
    wanted = np.where(words > 0, np.maximum(np.round(0.4 * words), 1), 0)
    np.testing.assert_array_equal(chosen.sum(-1), np.where(batch["text_valid"], wanted, 0))
    np.testing.assert_array_equal(out["mlm/text_mask"], batch["text_mask"])
    changed = np.zeros(before.shape, bool)
    for row, k, slot in zip(*np.nonzero(chosen), strict=True):
        place = int(out["mlm/slots"][row, k, slot])
        assert not changed[row, k, place], "no word twice"
        changed[row, k, place] = True
        assert before[row, k, place] == out["mlm/targets"][row, k, slot] >= 4
    assert (np.asarray(text == before) | changed).all(), "nothing else is touched"
    assert float(TASK.count(out, INFO)) == chosen.sum()


def test_eighty_ten_ten():
    after, targets = [], []
    for seed in range(4):
        batch, _ = a_batch(seed=seed)
        out = prepare(batch, seed)
        after += np.take_along_axis(out["mlm/text"], out["mlm/slots"], -1)[out["mlm/chosen"]].tolist()
        targets += out["mlm/targets"][out["mlm/chosen"]].tolist()
    after, targets = np.asarray(after), np.asarray(targets)
    assert len(after) > 3000
    assert np.mean(after == MASK) == pytest.approx(0.8 + 0.1 / VOCAB, abs=0.03)
    # A random token is the old one once in the vocabulary's size.
    assert np.mean(after == targets) == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)
    others = after[(after != MASK) & (after != targets)]
    assert len(set(others.tolist())) > VOCAB / 2


def test_a_row_is_a_function_of_its_own_key():
    batch, _ = a_batch()
    keys = jax.random.split(jax.random.key(7), 64)
    whole = COMPILED(batch, keys)
    order = np.random.default_rng(0).permutation(64)
    shuffled = COMPILED({k: v[order] for k, v in batch.items()}, keys[order])
    for name, rows in shuffled.items():
        np.testing.assert_array_equal(rows, whole[name][order])
    assert (COMPILED(batch, keys[order])["mlm/slots"] != whole["mlm/slots"]).any()


def test_loss_against_loops():
    batch, _ = a_batch()
    rng = np.random.default_rng(0)
    prepared = prepare(batch)
    states = rng.normal(size=(128, 40, 6)).astype(np.float32)
    table = rng.normal(size=(VOCAB, 6)).astype(np.float32)
    bias = rng.normal(size=VOCAB).astype(np.float32)
    heads = {"transform": lambda x: 2 * x, "bias": lambda logits: logits + bias}
    context = SimpleNamespace(
        batch=prepared, features={"mlm/text": TextFeatures(tokens=states)}, heads=heads, token_embed=table
    )
    output = TASK.loss(context)
    losses, right = [], []
    for row, k, slot in zip(*np.nonzero(prepared["mlm/chosen"]), strict=True):
        logits = table @ (2 * states[2 * row + k, prepared["mlm/slots"][row, k, slot]]) + bias
        target = int(prepared["mlm/targets"][row, k, slot])
        losses.append(np.log(np.exp(logits).sum()) - logits[target])
        right.append(logits.argmax() == target)
    assert float(output.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert [float(x) for x in output.metrics["accuracy"]] == [sum(right), len(right)]
    nothing = {**prepared, "mlm/chosen": np.zeros_like(prepared["mlm/chosen"])}
    assert float(TASK.loss(SimpleNamespace(**{**vars(context), "batch": nothing})).loss) == 0.0


def test_what_it_cannot_work_with():
    with pytest.raises(ConfigError, match="model.text.causal=False"):
        MaskedLanguageModel().check(DualEncoderConfig(text=TextConfig()))
    with pytest.raises(ConfigError, match="set model.text, which is None"):
        MaskedLanguageModel().check(SimpleNamespace(text=None))
    MaskedLanguageModel().check(DualEncoderConfig(text=BertConfig("tiny")))
    MaskedLanguageModel().check(DualEncoderConfig(text=TextConfig(causal=False)))
    without = ModelInfo(8, 8, 8, (), vocab_size=VOCAB, special_ids=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"no mask token; looked for \[MASK\], <mask>"):
        MaskedLanguageModel().heads(without)
    with pytest.raises(ConfigError, match="mask_fraction=1"):
        MaskedLanguageModel(mask_fraction=1)


def test_it_learns_beside_contrastive_and_from_texts_alone(tmp_path, fast_compilation):  # noqa: F811
    """Two tasks and two sources, one of them without images: the hidden words of a few texts are learned."""
    phantoms = Phantoms(num_patients=6, image_size=32)
    records = PhantomSource(phantoms)
    notes = [{"id": f"n{i}", "image": None, "caption": records[i]["caption"]} for i in range(8)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    base = tiny_config(tmp_path / "run", steps=60, batch_size=16)
    sources = (Source(phantoms=phantoms, split=None, cache=True), Source(root=str(tmp_path), split=None))
    text = BertConfig("tiny", hidden_size=48, num_heads=2, depth=1, max_positions=30, dropout=0.05)
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, text=text),
        tasks={"contrastive": Contrastive(weight=0.1), "mlm": MaskedLanguageModel()},
        data=dataclasses.replace(
            base.data, train=sources, tokenizer=TokenizerConfig(vocab_size=200, context_length=24)
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        log=dataclasses.replace(base.log, every=20),
        checkpoint=dataclasses.replace(base.checkpoint, every=0),
    )
    assert train(config) == 0
    rows = metric_rows(tmp_path / "run")
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.json", 24)
    texts = tokenizer.encode_texts([t for source in sources for t in training_texts([RecordSet(source)])])
    words = collections.Counter(texts[0][~np.isin(texts[0], tokenizer.special_ids)].tolist())
    most_frequent = words.most_common(1)[0][1] / words.total()
    assert rows[-1]["mlm/accuracy"] > 2 * most_frequent
    assert rows[-1]["loss/mlm"] < 0.75 * rows[0]["loss/mlm"]
    assert rows[-1]["loss/contrastive"] < rows[0]["loss/contrastive"]
    # Loaded, the tower drops nothing.
    loaded = load_components(tmp_path / "run")
    np.testing.assert_array_equal(*(embed_texts(loaded, ["no laser scar"]) for _ in range(2)))
    assert all(0 < row["contrastive/pairs"] < 14 for row in rows), "rows without an image form no pair"
