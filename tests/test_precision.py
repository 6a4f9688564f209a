"""bfloat16 reaches every tower: by shapes and traced programs alone, nothing is computed."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from bvl.mesh import unbox
from bvl.models.bert import BertConfig
from bvl.models.features import TextFeatures
from bvl.models.hybrid import HybridConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.tasks.base import ModelInfo
from bvl.tasks.mlm import MaskedLanguageModel

KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
TOKENS, MASK = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.bool_)
RANDOM = dict(dropout=0.1, drop_path=0.2)
VIT = dict(width=16, depth=2, num_heads=2, **RANDOM)
TOWERS = {
    "vit_map": ViTConfig("XXS/8", qk_norm=True, layer_scale=0.1, registers=2, scan=True, remat="full", **VIT),
    "vit_cls": ViTConfig("XXS/8", pool="cls", stem="conv", pre_norm=True, **VIT),
    "vit_mean": ViTConfig("XXS/8", pool="mean", **VIT),
    "resnet": ResNetConfig("RN50", width=8, stages=(1, 1, 1, 1), drop_path=0.2),
    "hybrid": HybridConfig(widths=(8, 16, 16), depths=(1, 1, 1), num_heads=2, drop_path=0.2),
    "text": TextConfig(width=16, depth=2, num_heads=2, **RANDOM),
    "text_mean": TextConfig(width=16, depth=2, num_heads=2, causal=False, pool="mean", **RANDOM),
    "bert": BertConfig("tiny", hidden_size=16, num_heads=2, pool="pooler", pool_layers=(1, -1), **RANDOM),
}


def products_in_float32(jaxpr):
    """Matrix products and convolutions whose both operands are float32."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            if all(x.aval.dtype == jnp.float32 for x in eqn.invars):
                yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                    yield from products_in_float32(item)


@pytest.mark.parametrize("name", TOWERS)
def test_features_and_products_are_bfloat16(name):
    """Also in the backward pass; parameters, their gradients and statistics stay float32."""
    if "text" in name or name == "bert":
        module = TOWERS[name].make(vocab_size=23, context_length=8, pad_id=0, end_id=2, dtype=jnp.bfloat16)
        inputs, options = (TOKENS, MASK), {}
    else:
        module = TOWERS[name].make(image_size=(32, 32), dtype=jnp.bfloat16)
        inputs, options = (IMAGE,), {"levels": True}
    params = unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]

    def gradient(params, keys, *inputs):
        def loss(params):
            out, sown = module.apply(
                {"params": params}, *inputs, keys=keys, mutable=["statistics"], **options
            )
            return out.pooled.sum().astype(jnp.float32), (out, sown)

        return jax.grad(loss, has_aux=True)(params)

    jaxpr, (grads, (out, sown)) = jax.make_jaxpr(gradient, return_shape=True)(params, KEYS, *inputs)
    features = {"pooled": out.pooled, "tokens": out.tokens, "levels": getattr(out, "levels", None)}
    for field, arrays in features.items():
        assert {x.dtype for x in jax.tree.leaves(arrays)} <= {jnp.dtype(jnp.bfloat16)}, field
    assert {x.dtype for x in jax.tree.leaves((params, grads, sown))} == {jnp.dtype(jnp.float32)}
    assert not list(products_in_float32(jaxpr))


def test_masked_language_modelling():
    """The product with the vocabulary is in bfloat16, its sums, the softmax and the loss in float32."""
    task = MaskedLanguageModel()
    info = ModelInfo(16, 16, 16, (), vocab_size=23, mask_id=3, special_ids=(0, 1, 2), dtype=jnp.bfloat16)
    heads = task.heads(info)
    key = jax.random.key(0)
    params = unbox({name: jax.eval_shape(head.init, key) for name, head in heads.items()})
    batch = {f"mlm/{name}": jnp.zeros((2, 1, 3), jnp.int32) for name in ("slots", "targets")}
    batch["mlm/chosen"] = jnp.ones((2, 1, 3), bool)

    def loss(params, table, tokens):
        applied = {
            n: functools.partial(head.module.apply, {"params": params[n]}) for n, head in heads.items()
        }
        features = {"mlm/text": TextFeatures(tokens=tokens)}
        return task.loss(
            SimpleNamespace(batch=batch, features=features, heads=applied, token_embed=table)
        ).loss

    table = jax.ShapeDtypeStruct((23, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16)
    jaxpr, out = jax.make_jaxpr(loss, return_shape=True)(params, table, tokens)
    assert out.dtype == jnp.float32 and not list(products_in_float32(jaxpr))
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert products[-1].outvars[0].aval.dtype == jnp.float32
