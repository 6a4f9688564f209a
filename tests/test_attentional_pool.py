"""What a decoder reads of an image where that is not one token a patch: pooled by queries, or with the class token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.attentional_pool import AttentionalPool
from bvl.models.decoder import DecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

VIT = ViTConfig("XXS/8", pool="cls", width=16, depth=1, num_heads=2)
POOL = AttentionalPool(width=8, queries=3, num_heads=2)
MODEL = DualEncoderConfig(
    image=dataclasses.replace(VIT, attentional_pool=POOL),
    text=None,
    decoder=DecoderConfig(width=8, depth=1, num_heads=2),
    embed_dim=6,
    init_temperature=None,
)


@functools.cache
def made(config: DualEncoderConfig):
    """(model, random parameters, two images of 2 x 3 patches)"""
    model = DualEncoder(config, (16, 24), vocab_size=11, context_length=5, end_id=1)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 16, 24, 3)), jnp.float32)
    tokens = jnp.zeros((2, 5), jnp.int32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), images, tokens, tokens == 0)["params"])
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)
    return model, params, images


def encoded(config: DualEncoderConfig, *need: str):
    model, params, images = made(config)
    return model.apply({"params": params}, images, frozenset(need), method="encode_image")


def test_the_decoder_reads_all_queries_but_the_pooled_one():
    features = encoded(MODEL, "visual", "pooled", "tokens", "embed")
    assert features.for_decoder.shape == (2, 2, 8) and features.pooled.shape == (2, 8)
    assert features.tokens.shape == (2, 6, 16) and features.embed.shape == (2, 6)
    mean = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, pool="mean", class_token=True))
    # The parameters are the same; only what is pooled differs.
    again = encoded(mean, "visual", "pooled")
    np.testing.assert_allclose(again.pooled, features.for_decoder.mean(1), atol=1e-6)
    assert encoded(MODEL, "pooled").visual is None, "what nobody asks for costs nothing"


def test_a_patch_alone_is_what_any_query_gives_of_one_token():
    features = encoded(MODEL, "patch_embed")
    model, params, images = made(MODEL)

    def one(module, images):
        x = module.image(images, patches=True)
        return x.patches, x.tokens

    patches, tokens = model.apply({"params": params}, images, method=one)
    attention = params["image"]["attentional_pool"]["attention"]
    value = tokens @ attention["value"]["kernel"] + attention["value"]["bias"]
    expected = value @ attention["out"]["kernel"] + attention["out"]["bias"]
    norm = params["image"]["norm"]
    expected = (expected - expected.mean(-1, keepdims=True)) / np.sqrt(expected.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(patches, expected * norm["scale"] + norm["bias"], atol=1e-5)
    assert features.patch_embed.shape == (2, 6, 6)


@pytest.mark.parametrize("visual, count", [("patches", 6), ("all", 7), ("unnormed", 7)])
def test_all_tokens_of_a_vit(visual, count):
    config = dataclasses.replace(MODEL, image=VIT, decoder=dataclasses.replace(MODEL.decoder, visual=visual))
    features = encoded(config, "visual", "tokens", "pooled")
    assert features.for_decoder.shape == (2, count, 16)
    if visual == "all":
        np.testing.assert_array_equal(features.for_decoder[:, 0], features.pooled)
        np.testing.assert_array_equal(features.for_decoder[:, 1:], features.tokens)
    if visual == "unnormed":
        assert np.abs(np.asarray(features.for_decoder[:, 1:] - features.tokens)).max() > 0.1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: AttentionalPool(width=8, queries=1), "queries=1"),
        (lambda: AttentionalPool(width=9, num_heads=2), "divisible"),
        (lambda: dataclasses.replace(VIT, pool="map", attentional_pool=POOL), "pool='map'"),
        (
            lambda: dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, visual="all")),
            "visual='all' belongs to",
        ),
        (
            lambda: DualEncoderConfig(image=ResNetConfig(), text=None, decoder=DecoderConfig(visual="all")),
            "ViTConfig",
        ),
        (
            lambda: dataclasses.replace(MODEL, region_encoder=RegionEncoderConfig()),
            "region modules of a decoder need",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
