"""The BERT-type text tower and the parts of its masked-language-model head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.bert import BertConfig, MlmTransform, VocabularyBias

PAD, END, VOCAB, CONTEXT = 0, 2, 20, 6
TOKENS = jnp.asarray([[1, 5, 6, 7, END, PAD], [1, 9, END, PAD, PAD, PAD]])
MASK = TOKENS != PAD
TINY = functools.partial(BertConfig, "tiny", hidden_size=16, num_heads=2, max_positions=8)


def make(config, **options):
    given = dict(vocab_size=VOCAB, context_length=CONTEXT, pad_id=PAD, end_id=END)
    return config.make(**{**given, **options})


def num_params(config, vocab_size):
    module = make(config, vocab_size=vocab_size)
    tree = jax.eval_shape(module.init, jax.random.key(0), TOKENS, MASK)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tower(config):
    module = make(config)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), TOKENS, MASK)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)
    return params, lambda tokens, mask=MASK, **kw: module.apply({"params": params}, tokens, mask, **kw)


@pytest.mark.parametrize(
    ("variant", "vocab_size", "published"),
    [
        ("base", 30522, 109_482_240),
        ("pubmedbert", 30522, 109_482_240),
        ("clinicalbert", 28996, 108_310_272),
        ("minilm-l6", 30522, 22_713_216),
    ],
)
def test_number_of_parameters(variant, vocab_size, published):
    """With the pooler, as the published checkpoints count."""
    assert num_params(BertConfig(variant, pool="pooler", scan=True), vocab_size) == published


def test_pooler_is_the_only_difference_between_pools():
    assert num_params(TINY(pool="pooler"), VOCAB) - num_params(TINY(pool="cls"), VOCAB) == 16 * 17


@pytest.mark.parametrize("pool", ["cls", "mean", "max", "pooler"])
def test_what_stands_in_the_padding_changes_nothing(pool):
    params, f = tower(TINY(pool=pool))
    out = f(TOKENS)
    other = f(jnp.where(MASK, TOKENS, 11))
    np.testing.assert_allclose(other.pooled, out.pooled, atol=1e-5)
    if pool == "cls":
        np.testing.assert_array_equal(out.pooled, out.tokens[:, 0])
    if pool == "pooler":
        dense = params["pooler"]
        want = np.tanh(out.tokens[:, 0] @ dense["kernel"] + dense["bias"])
        np.testing.assert_allclose(out.pooled, want, atol=1e-5)
    assert out.tokens.shape == (2, CONTEXT, 16) and (out.mask == MASK).all()


def test_post_norm_and_both_directions():
    params, f = tower(TINY())
    out = f(TOKENS)
    # The last operation is a layer norm: without its scale and bias every token has mean 0 and variance 1.
    norm = params["stack"]["block_1"]["mlp_norm"]
    plain = (out.tokens - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-3)
    np.testing.assert_allclose(plain.var(-1), 1, atol=1e-3)
    later = f(TOKENS.at[0, 3].set(8))
    assert np.abs(later.tokens[0, 0] - out.tokens[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(later.tokens[1], out.tokens[1])


def test_pooling_several_layers():
    _, f = tower(TINY(depth=3))
    _, several = tower(TINY(depth=3, pool="mean", pool_layers=(1, -1)))
    last, pooled = f(TOKENS).tokens, several(TOKENS)
    np.testing.assert_array_equal(pooled.tokens, last)
    _, first = tower(TINY(depth=3, pool="mean", pool_layers=(1,)))
    _, mean = tower(TINY(depth=3, pool="mean"))
    want = (first(TOKENS).pooled + mean(TOKENS).pooled) / 2
    np.testing.assert_allclose(pooled.pooled, want, atol=1e-5)
    assert np.abs(first(TOKENS).pooled - mean(TOKENS).pooled).max() > 1e-2
    _, one = tower(TINY(depth=3, pool="mean", pool_layers=(3,)))
    np.testing.assert_allclose(one(TOKENS).pooled, mean(TOKENS).pooled, atol=1e-6)


def test_token_types():
    _, f = tower(TINY())
    zeros, ones = jnp.zeros_like(TOKENS), jnp.ones_like(TOKENS)
    np.testing.assert_array_equal(f(TOKENS, types=zeros).pooled, f(TOKENS).pooled)
    assert np.abs(f(TOKENS, types=ones).pooled - f(TOKENS).pooled).max() > 1e-3


def test_dropout_only_with_keys():
    _, f = tower(TINY(depth=1, dropout=0.2))
    _, without = tower(TINY(depth=1, dropout=0.0))
    np.testing.assert_array_equal(f(TOKENS).pooled, without(TOKENS).pooled)
    keys = jax.random.split(jax.random.key(1), 2)
    both = f(TOKENS, keys=keys).pooled
    assert np.abs(both - f(TOKENS).pooled).max() > 1e-3
    np.testing.assert_allclose(f(TOKENS[1:], MASK[1:], keys=keys[1:]).pooled, both[1:], atol=1e-5)


def test_scanned_blocks_give_the_same():
    params, f = tower(TINY())
    module = make(TINY(scan=True, remat="full"))
    blocks = jax.tree.map(lambda *x: np.stack(x), *(params["stack"][f"block_{i}"] for i in range(2)))
    scanned = module.apply({"params": {**params, "stack": {"blocks": blocks}}}, TOKENS, MASK)
    np.testing.assert_allclose(scanned.tokens, f(TOKENS).tokens, atol=1e-5)


def test_head_of_the_language_model():
    """Dense, GELU, layer norm, then the bias of each word."""
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    module = MlmTransform()
    params = module.init(jax.random.key(0), x)
    h = module.apply(params, x)
    assert h.shape == x.shape
    np.testing.assert_allclose(h.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(h.var(-1), 1, atol=1e-4)
    logits = VocabularyBias().apply({"params": {"bias": np.arange(8.0)}}, jnp.asarray(x))
    np.testing.assert_allclose(logits, x + np.arange(8.0), rtol=1e-6)


def test_sizes():
    assert BertConfig("minilm-l6").sizes == (384, 6, 12, 1536) and BertConfig("minilm-l6").width == 384
    assert BertConfig("base", hidden_size=96, depth=2).sizes == (96, 2, 12, 384)
    assert BertConfig("base", mlp_hidden=100).sizes == (768, 12, 12, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "BERT-base"}, "nearest is 'base'"),
        ({"variant": "minilm"}, "nearest is 'minilm-l6'"),
        ({"num_heads": 7}, "not divisible by num_heads 7"),
        ({"depth": 0}, "at least 1"),
        ({"max_positions": 0}, "max_positions"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pool_layers": (0,)}, "numbered 1 to 12"),
        ({"depth": 2, "pool_layers": (1, 3)}, "numbered 1 to 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        BertConfig(**options)


def test_texts_that_are_too_long():
    message = r"context_length=9 is longer than .* model.text.max_positions=8"
    with pytest.raises(ConfigError, match=message):
        make(TINY(), context_length=9)
    with pytest.raises(ConfigError, match="6 tokens, but the text tower was made for 4"):
        jax.eval_shape(lambda: make(TINY(), context_length=4).init(jax.random.key(0), TOKENS, MASK))
