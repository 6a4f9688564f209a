"""Text transformers of the CLIP and SigLIP types: masks, pooling, options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.text import TextConfig, pool_tokens

PAD, END, VOCAB, CONTEXT = 0, 2, 20, 6
TOKENS = jnp.asarray([[1, 5, 6, 7, END, PAD], [1, 9, END, PAD, PAD, PAD]])
MASK = TOKENS != PAD
OTHER_PADDING = jnp.where(MASK, TOKENS, 11)
CLIP = TextConfig(width=16, depth=2, num_heads=2)
SIGLIP = dataclasses.replace(
    CLIP, causal=False, pool="last", attend_padding=True, activation="gelu_tanh", norm_epsilon=1e-6
)


def tower(config, context=CONTEXT):
    module = config.make(vocab_size=VOCAB, context_length=context, pad_id=PAD, end_id=END)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), TOKENS, MASK)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)
    return lambda tokens, mask=MASK, keys=None: module.apply({"params": params}, tokens, mask, keys=keys)


def test_pooling_against_loops():
    x = np.random.default_rng(0).normal(size=(2, CONTEXT, 3)).astype(np.float32)
    lengths = (5, 3)
    expected = {
        "end": [x[i, n - 1] for i, n in enumerate(lengths)],
        "mean": [x[i, :n].mean(0) for i, n in enumerate(lengths)],
        "max": [x[i, :n].max(0) for i, n in enumerate(lengths)],
        "last": [x[i, -1] for i in range(2)],
        "cls": [x[i, 0] for i in range(2)],
    }
    for pool, want in expected.items():
        np.testing.assert_allclose(pool_tokens(jnp.asarray(x), TOKENS, MASK, pool, END), want, rtol=1e-6)
    for pool in ("mean", "max"):
        nothing = pool_tokens(jnp.asarray(x), TOKENS, jnp.zeros_like(MASK), pool, END)
        np.testing.assert_array_equal(nothing, 0.0)


@pytest.mark.parametrize("pool", ["end", "mean", "max"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_in_the_padding_changes_nothing(pool, causal):
    f = tower(dataclasses.replace(CLIP, pool=pool, causal=causal))
    np.testing.assert_allclose(f(OTHER_PADDING).pooled, f(TOKENS).pooled, atol=1e-5)


def test_siglip_reads_the_padding_and_both_directions():
    f = tower(SIGLIP)
    out = f(TOKENS)
    np.testing.assert_array_equal(out.pooled, out.tokens[:, -1])
    assert np.abs(f(OTHER_PADDING).pooled - out.pooled).max() > 1e-3
    np.testing.assert_array_equal(f(TOKENS, jnp.ones_like(MASK)).pooled, out.pooled)
    # The first token sees the last.
    assert np.abs(f(TOKENS.at[:, -1].set(9)).tokens[:, 0] - out.tokens[:, 0]).max() > 1e-4


def test_dropout_only_with_keys_and_by_row():
    f = tower(dataclasses.replace(CLIP, dropout=0.3, drop_path=0.2))
    plain = f(TOKENS).pooled
    np.testing.assert_array_equal(plain, tower(CLIP)(TOKENS).pooled)
    keys = jax.random.split(jax.random.key(1), 2)
    both = f(TOKENS, keys=keys).pooled
    assert np.abs(both - plain).max() > 1e-3
    # A row's mask is its own, whatever rows stand beside it.
    one = f(TOKENS[1:], MASK[1:], keys=keys[1:]).pooled
    np.testing.assert_allclose(both[1:], one, rtol=1e-5, atol=1e-6)
    same = f(jnp.repeat(TOKENS[:1], 2, 0), jnp.repeat(MASK[:1], 2, 0), keys=keys).pooled
    assert np.abs(same[0] - same[1]).max() > 1e-3


def test_initial_scale_of_the_embeddings():
    config = dataclasses.replace(CLIP, width=64, token_std=0.5, position_std=0.25)
    module = config.make(vocab_size=200, context_length=100, pad_id=PAD, end_id=END)
    params = jax.jit(module.init)(jax.random.key(0), TOKENS, MASK)["params"]
    for name, std in (("token_embed", 0.5), ("positions", 0.25)):
        assert np.std(params[name].value) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "cls"}, "first token sees no other"),
        ({"pool": "last"}, "attend_padding=True"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"drop_path": -0.1}, "drop_path"),
        ({"width": 10, "num_heads": 3}, "not divisible"),
        ({"mlp_hidden": 0}, "must be at least 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**options)


def test_a_text_longer_than_the_context():
    with pytest.raises(ConfigError, match="6 tokens, but the text tower was made for 4"):
        tower(CLIP, context=4)
