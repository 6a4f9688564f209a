"""Numbers of parameters, equal to those of the published models. Shapes only: no array is made."""

import jax
import numpy as np
import pytest

from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

CLIP_IMAGE = dict(pool="cls", pre_norm=True, patch_bias=False)
SIGLIP_IMAGE = dict(pool="map", norm_epsilon=1e-6)


def clip(variant: str, width: int, embed_dim: int) -> DualEncoderConfig:
    text = TextConfig(width=width, depth=12, num_heads=width // 64)
    return DualEncoderConfig(image=ViTConfig(variant, **CLIP_IMAGE), text=text, embed_dim=embed_dim)


def siglip(variant: str, width: int, depth: int, num_heads: int, mlp_hidden: int) -> DualEncoderConfig:
    text = TextConfig(width=width, depth=depth, num_heads=num_heads, mlp_hidden=mlp_hidden, causal=False)
    return DualEncoderConfig(
        image=ViTConfig(variant, **SIGLIP_IMAGE),
        text=text,
        embed_dim=width,
        image_projection="none",
        text_projection="linear_bias",
        init_temperature=0.1,
        init_bias=-10.0,
    )


# config, image size, vocabulary, context, parameters of the image tower with its projection, of the whole model.
# As counted in open_clip 3.3's models ViT-B-32, ViT-L-14, RN50, ViT-B-16-SigLIP and ViT-SO400M-14-SigLIP.
PUBLISHED = {
    "ViT-B/32": (clip("B/32", 512, 512), 224, 49408, 77, 87_849_216, 151_277_313),
    "ViT-L/14": (clip("L/14", 768, 768), 224, 49408, 77, 303_966_208, 427_616_513),
    "RN50": (
        DualEncoderConfig(
            image=ResNetConfig("RN50"),
            text=TextConfig(width=512, depth=12, num_heads=8),
            embed_dim=1024,
            image_projection="linear_bias",
        ),
        224,
        49408,
        77,
        38_316_896,
        102_007_137,
    ),
    "ViT-B/16 SigLIP": (siglip("B/16", 768, 12, 12, 3072), 224, 32000, 64, 92_884_224, 203_155_970),
    "So400m/14 SigLIP": (siglip("So400m/14", 1152, 27, 16, 4304), 224, 32000, 16, 427_680_704, 877_360_306),
}


def count(tree) -> int:
    """Learned numbers: the running statistics of a batch norm are none."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(x.size for path, x in leaves if "running_" not in jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    config, size, vocab_size, context_length, of_image, of_all = PUBLISHED[name]
    module = DualEncoder(config, (size, size), vocab_size, context_length, end_id=vocab_size - 1)
    image, tokens = np.zeros((1, size, size, 3), np.float32), np.zeros((1, context_length), np.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), image, tokens, tokens == 0))["params"]
    assert count(params["image"]) + count(params.get("image_projection", {})) == of_image
    assert count(params) == of_all
