"""A config's model put together for a tokenizer, and the shapes of its parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bvl.config import Config
from bvl.data.text import Tokenizer
from bvl.mesh import unbox
from bvl.models.vlm import DualEncoder


def embedding_rows(config: Config, tokenizer: Tokenizer) -> int:
    """Rows of the token embeddings: one for each id, or as many as an imported model brings."""
    return max(tokenizer.vocab_size, config.data.tokenizer.embedding_rows or 0)


def build_model(config: Config, tokenizer: Tokenizer) -> DualEncoder:
    """The model of a config; vocabulary, context and image size come from the tokenizer and the preprocessing."""
    return DualEncoder(
        config.model,
        image_size=config.data.preprocess.height_width,
        vocab_size=embedding_rows(config, tokenizer),
        context_length=tokenizer.context_length,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
        prefix_length=config.data.controls.num_slots,
        dtype=jnp.dtype(config.precision),
    )


def parameter_shapes(model: DualEncoder) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a model, without making any."""
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, model.context_length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, model.context_length), jnp.bool_)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image, tokens, mask))["params"]
    return {
        "/".join(key.key for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
