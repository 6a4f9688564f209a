"""Which texts belong to which images: the targets of the contrastive losses, without an [n, m] matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, UInt

from bvl.errors import ConfigError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "cols"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True)
class Targets:
    """Which text is a positive of which image, without an [n, m] matrix.

    `rows` and `cols` are pytrees of arrays with leading axis n and m, one descriptor an image and one a text;
    they are split over the devices as the features are. `block(rows, cols)` is a static function that turns the
    descriptors of r images and c texts into their [r, c] target weights, which are >= 0 and, for `sigmoid_loss`,
    <= 1. It must treat every pair on its own. Targets are constants: no gradient flows into the descriptors.
    """

    rows: PyTree[Array]
    cols: PyTree[Array]
    block: Callable[[PyTree, PyTree], Array]


def diagonal(num_images: int, num_texts: int) -> Targets:
    """Text j belongs to image j // K, for num_texts = K num_images: the i-th pair, or K texts in a row an image.

    Raises ConfigError if num_texts is not a multiple of num_images.
    """
    return Targets(jnp.arange(num_images), image_of_each_text(num_images, num_texts), _equal)


def multi_text(image_of_text: Int[Array, " m"], *, num_images: int) -> Targets:
    """Text j belongs to the image with the global index image_of_text[j]: any number of texts an image."""
    return Targets(jnp.arange(num_images), jnp.asarray(image_of_text), _equal)


def same_text(image_text_ids: UInt[Array, " n"] | UInt[Array, "n K"], text_ids: UInt[Array, " m"]) -> Targets:
    """Texts with the same hash as a text of the image are positives too, beside the image's own (`diagonal`).

    `image_text_ids` has the hash of the image's text, or of its K texts.
    """
    ids = jnp.asarray(image_text_ids)
    ids = ids[:, None] if ids.ndim == 1 else ids
    index, owner = jnp.arange(len(ids)), image_of_each_text(len(ids), len(text_ids))
    return Targets((index, ids), (owner, jnp.asarray(text_ids)), _same_text_block)


def same_labels(
    image_labels: Float[Array, "n C"], text_labels: Float[Array, "m C"], *, soft: bool = False
) -> Targets:
    """Texts of an example with equal labels are positives too, beside the image's own (`diagonal`).

    Labels are multi-hot, 0 or 1. With `soft`, examples that share some labels are positives by the weight
    |both| / |either| (Jaccard); two examples without any label count as equal either way. A row of labels with a NaN
    is unknown: it is like no other.
    """
    image_labels, text_labels = jnp.asarray(image_labels, jnp.float32), jnp.asarray(text_labels, jnp.float32)
    index, owner = jnp.arange(len(image_labels)), image_of_each_text(len(image_labels), len(text_labels))
    block = _label_overlap_block if soft else _equal_labels_block
    return Targets((index, image_labels), (owner, text_labels), block)


def label_similarity(
    image_labels: Float[Array, "n C"], text_labels: Float[Array, "m C"], *, temperature: float = 1.0
) -> Targets:
    """Every text is a positive, the more so the more its labels are like the image's: weights exp(cosine / temperature).

    Since the losses divide by the sum of an image's weights, its targets are softmax_j(cos(l_i, l_j) / temperature),
    MedCLIP's semantic matching (Wang et al. 2022, arXiv:2210.10163, eq. 3 and 4). Labels are multi-hot; two examples
    without any label have cosine 1, and one without has cosine 0 to one with. A row of labels with a NaN is unknown:
    it has weight with its own pair alone. All weights are divided by exp(1 / temperature), which changes no target.

    Raises ConfigError for a temperature that is not above 0.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} of the label similarity: must be above 0")

    def unit(labels: Array) -> Array:
        # One more column marks "no label at all", so that the empty sets are like each other.
        labels = jnp.asarray(labels, jnp.float32)
        labels = jnp.concatenate([labels, (labels.sum(1, keepdims=True) == 0).astype(jnp.float32)], 1)
        return labels / jnp.sqrt(temperature * jnp.square(labels).sum(1, keepdims=True))

    image_labels, text_labels = unit(image_labels), unit(text_labels)
    index, owner = jnp.arange(len(image_labels)), image_of_each_text(len(image_labels), len(text_labels))
    return Targets((index, image_labels), (owner, text_labels), _label_similarity_block)


def image_of_each_text(num_images: int, num_texts: int) -> Int[Array, " m"]:
    """Index of the image of every text where each image has the same number of texts in a row.

    Raises ConfigError if num_texts is not a multiple of num_images.
    """
    if num_images < 1 or num_texts % num_images:
        raise ConfigError(
            f"{num_texts} texts for {num_images} images: give the same number of texts for every image, "
            "or say whose each text is with targets=multi_text(...)"
        )
    return jnp.arange(num_texts) // (num_texts // num_images)


def _equal(rows, cols):
    return (rows[:, None] == cols[None, :]).astype(jnp.float32)


def _same_text_block(rows, cols):
    (index, ids), (owner, text_ids) = rows, cols
    positive = index[:, None] == owner[None, :]
    for k in range(ids.shape[1]):
        positive |= ids[:, k, None] == text_ids[None, :]
    return positive.astype(jnp.float32)


def _label_overlap_block(rows, cols):
    (index, labels), (owner, text_labels) = rows, cols
    both = jnp.einsum("ic,jc->ij", labels, text_labels, precision="highest")
    either = labels.sum(1)[:, None] + text_labels.sum(1)[None, :] - both
    overlap = jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)
    overlap = jnp.where(jnp.isnan(both), 0.0, overlap)
    return jnp.where(index[:, None] == owner[None, :], 1.0, overlap)


def _equal_labels_block(rows, cols):
    return (_label_overlap_block(rows, cols) == 1.0).astype(jnp.float32)


def _label_similarity_block(rows, cols):
    (index, labels), (owner, text_labels) = rows, cols
    logits = jnp.einsum("ic,jc->ij", labels, text_labels, precision="highest")
    # The square of a row's own length is the largest logit there can be.
    weights = jnp.exp(logits - jnp.square(labels).sum(1)[:, None])
    weights = jnp.where(jnp.isnan(weights), 0.0, weights)
    return jnp.where(index[:, None] == owner[None, :], 1.0, weights)
