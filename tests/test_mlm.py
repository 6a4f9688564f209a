"""Masked language modelling: which words are hidden, the loss against loops, and what it learns."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PHANTOMS, fast_compilation, metric_rows, tiny_config  # noqa: F401

from bvl.errors import ConfigError
from bvl.models.bert import BertConfig
from bvl.models.features import TextFeatures
from bvl.models.text import TextConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.base import ModelInfo
from bvl.tasks.mlm import MaskedLanguageModel

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
    MaskedLanguageModel().check(DualEncoderConfig(text=BertConfig("tiny")))
    MaskedLanguageModel().check(DualEncoderConfig(text=TextConfig(causal=False)))
    without = ModelInfo(8, 8, 8, (), vocab_size=VOCAB, special_ids=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"no mask token; looked for \[MASK\], <mask>"):
        MaskedLanguageModel().heads(without)
    with pytest.raises(ConfigError, match="mask_fraction=1"):
        MaskedLanguageModel(mask_fraction=1)
