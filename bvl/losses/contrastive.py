"""Contrastive losses between images and texts: softmax (CLIP) and sigmoid (SigLIP).

`softmax_loss` and `sigmoid_loss` never hold the [n, m] matrix of logits: they go through it block by block
(`bvl/losses/ring.py`), over all devices of a mesh, and their backward pass recomputes the blocks. Each has a
naive twin with the same meaning that builds the whole matrix; tests compare values and gradients of the two.

Both losses are built from one term an image and one term a text, so that they share their backward pass:
with a_i and b_j the derivatives of the loss by these terms, the derivative by a logit is

    softmax   G_ij = a_i (softmax_j(s_i.)  - q_ij) + b_j (softmax_i(s_.j) - r_ij)
    sigmoid   G_ij = (a_i + b_j) (sigmoid(s_ij) - t_ij)

and from G follow d image = scale G text, d text = scale G^T image, d scale = sum(image * G text), d bias = sum G.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from bvl.errors import ConfigError
from bvl.losses.ring import blocked_loop
from bvl.losses.targets import Targets, diagonal, image_of_each_text

# Stands for minus infinity where a difference of two of them must be 0, not NaN.
_LOWEST = -1e30


# --- The losses -------------------------------------------------------------------------------------------

TargetsLike = Targets | Callable[[int, int], Targets]
PairWeights = Float[Array, " n"] | tuple[Float[Array, " n"], Float[Array, " m"]]


def softmax_loss(
    image: Float[Array, "n d"],
    text: Float[Array, "m d"],
    *,
    scale: Float[Array, ""] | float,
    targets: TargetsLike = diagonal,
    label_smoothing: float = 0.0,
    direction_weights: tuple[float, float] = (0.5, 0.5),
    image_valid: Bool[Array, " n"] | None = None,
    text_valid: Bool[Array, " m"] | None = None,
    pair_weights: PairWeights | None = None,
    mesh: Mesh | None = None,
    chunk_size: int | None = None,
    groups: int = 1,
) -> Float[Array, ""]:
    """Cross-entropy of every image over all texts and of every text over all images (CLIP, Radford et al. 2021, fig. 3).

    With logits s_ij = scale <image_i, text_j> and target weights t_ij (several positives as in UniCL, Yang et al. 2022)

        image i:  l_i = -sum_j q_ij log softmax_j(s_ij),  q_ij = (1 - e) t_ij / sum_j t_ij + e / (valid texts)
        text j:   l_j = -sum_i r_ij log softmax_i(s_ij),  r_ij = (1 - e) t_ij / sum_i t_ij + e / (valid images)
        loss   =  direction_weights[0] mean_i(w_i l_i) + direction_weights[1] mean_j(w_j l_j)

    where softmax and sums run over valid candidates only, e is `label_smoothing` (spread evenly over the valid
    candidates, positives included), and a mean is over the rows that contribute: valid ones with a positive
    among the valid candidates. No such row: the direction is 0.

    `scale` multiplies (the exponential is already taken). `image` and `text` are usually of unit norm; what
    stands in invalid rows is ignored, NaN included. `pair_weights` are w_i [n]; the text j of image j // K then
    has the weight of its image. For other texts, or weights of their own, give the tuple (w_i [n], w_j [m]).
    A mean divides by the number of contributing rows, not by the sum of weights (as ALIP, Yang et al. 2023).

    Features of any float type; products, sums and the result are f32. With a mesh, rows of images and texts
    are split over its batch axes, and no device holds more than [its rows, chunk_size] logits; None picks
    blocks of 8 MiB. Differentiable in image, text, scale and pair_weights.

    With `groups`, images and texts are cut into as many equal runs and are candidates of each other only within a run
    (M2-Encoder: Guo et al. 2024, arXiv:2401.15896): the sums above and the valid candidates are those of the own group,
    while a mean goes over the contributing rows of all groups. So the loss is the mean of the groups' losses, each
    weighted, in each direction, by its number of contributing rows. Images and texts of a pair must be in one group.
    Raises ConfigError when shapes do not fit each other, the groups or the mesh.
    """
    rows, cols, targets = _rows_and_cols(image, text, targets, image_valid, text_valid)
    image_weights, text_weights = _weights(pair_weights, len(image), len(text))
    (image_terms, image_counts), (text_terms, text_counts) = _cross_entropies(
        targets.block,
        float(label_smoothing),
        mesh,
        chunk_size,
        groups,
        jnp.asarray(scale, jnp.float32),
        rows,
        cols,
    )
    to_text, to_image = direction_weights
    return to_text * _mean(image_terms * image_weights, image_counts) + to_image * _mean(
        text_terms * text_weights, text_counts
    )


def sigmoid_loss(
    image: Float[Array, "n d"],
    text: Float[Array, "m d"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    targets: TargetsLike = diagonal,
    image_valid: Bool[Array, " n"] | None = None,
    text_valid: Bool[Array, " m"] | None = None,
    pair_weights: PairWeights | None = None,
    mesh: Mesh | None = None,
    chunk_size: int | None = None,
    groups: int = 1,
) -> Float[Array, ""]:
    """Binary cross-entropy of every image-text pair (SigLIP, Zhai et al. 2023, eq. 1).

    With logits s_ij = scale <image_i, text_j> + bias and target weights t_ij in [0, 1]

        loss = -sum_ij w_ij (t_ij log sigmoid(s_ij) + (1 - t_ij) log sigmoid(-s_ij)) / (number of valid images)

    over the pairs of a valid image and a valid text: for t = 1 on the diagonal and 0 elsewhere, the paper's loss.
    `pair_weights` are as in `softmax_loss` and w_ij = (w_i + w_j) / 2, the mean of the image's and the text's.
    No valid image: 0. With `groups`, the sum goes over the pairs within a group: the loss is the mean of the groups'
    losses, each weighted by its number of valid images.
    Everything else (`scale`, invalid rows, types, mesh, errors) is as in `softmax_loss`.
    Differentiable in image, text, scale, bias and pair_weights.
    """
    rows, cols, targets = _rows_and_cols(image, text, targets, image_valid, text_valid)
    image_weights, text_weights = _weights(pair_weights, len(image), len(text))
    image_terms, text_terms = _binary_cross_entropies(
        targets.block,
        mesh,
        chunk_size,
        groups,
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        rows,
        cols,
    )
    total = (jnp.sum(image_terms * image_weights) + jnp.sum(text_terms * text_weights)) / 2
    return total / jnp.maximum(jnp.sum(rows["valid"]), 1)


# --- What both need: arguments, logits, gradients ---------------------------------------------------------


def _rows_and_cols(image, text, targets, image_valid, text_valid) -> tuple[dict, dict, Targets]:
    """All that one image (row) and one text (column) bring into a block."""
    n, m = len(image), len(text)
    targets = targets if isinstance(targets, Targets) else targets(n, m)

    def side(name, features, valid, descriptors):
        size = len(features)
        masked = valid is not None
        valid = jnp.asarray(valid, bool) if masked else jnp.ones(size, bool)
        given = [(f"{name}_valid", valid), *((f"targets of {name}", x) for x in jax.tree.leaves(descriptors))]
        for what, leaf in given:
            if leaf.shape[:1] != (size,):
                raise ConfigError(
                    f"{what} has shape {leaf.shape} but {name} has {size} rows; give one for each"
                )
        if masked:
            features = jnp.where(valid[:, None], features, 0)
        return {"features": features, "valid": valid, "target": jax.lax.stop_gradient(descriptors)}

    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ConfigError(
            f"image {image.shape} and text {text.shape} must be [n, d] and [m, d] with the same d"
        )
    rows = side("image", image, image_valid, targets.rows)
    cols = side("text", text, text_valid, targets.cols)
    return rows, cols, targets


def _weights(pair_weights, n: int, m: int) -> tuple[Array, Array]:
    if pair_weights is None:
        return jnp.ones(n), jnp.ones(m)
    if not isinstance(pair_weights, tuple):
        pair_weights = (pair_weights, jnp.asarray(pair_weights)[image_of_each_text(n, m)])
    weights = tuple(jnp.asarray(w, jnp.float32) for w in pair_weights)
    if [w.shape for w in weights] != [(n,), (m,)]:
        raise ConfigError(
            f"pair_weights of shapes {[w.shape for w in weights]}: give [{n}] or ([{n}], [{m}])"
        )
    return weights


def _mean(terms, counts):
    return jnp.sum(terms) / jnp.maximum(jnp.sum(counts), 1)


def _pairs(block, rows, cols, shared):
    """The logits, the validity and the target weights (0 for invalid pairs) of one block, each [r, c]."""
    products = _matmul("id,jd->ij", rows["features"], cols["features"])
    valid = rows["valid"][:, None] & cols["valid"][None, :]
    target = jnp.where(valid, block(rows["target"], cols["target"]).astype(jnp.float32), 0.0)
    return shared["scale"] * products + shared["bias"], valid, target


def _matmul(subscripts, a, b):
    # Full f32 products: the default of GPUs (TF32) and TPUs (bf16) would be seen in the gradient of a sharp softmax.
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision="highest")


def _gradients(logit_gradient, rows, cols, scale, bias, mesh, chunk_size, groups):
    """d loss / d (scale, bias, rows, cols), given `logit_gradient(rows, cols, shared)` -> d loss / d logits [r, c]."""

    def block(rows, cols, row_state, col_state, shared):
        gradient = logit_gradient(rows, cols, shared)
        image, text = rows["features"].astype(jnp.float32), cols["features"].astype(jnp.float32)
        row_state = {
            "features": row_state["features"] + _matmul("ij,jd->id", gradient, text),
            "bias": row_state["bias"] + gradient.sum(1),
        }
        return row_state, col_state + _matmul("ij,id->jd", gradient, image)

    image, text = rows["features"], cols["features"]
    zeros = jnp.zeros(image.shape, jnp.float32)
    row_state, d_text = blocked_loop(
        block,
        rows=rows,
        cols=cols,
        row_state={"features": zeros, "bias": jnp.zeros(len(image))},
        col_state=jnp.zeros(text.shape, jnp.float32),
        shared={"scale": scale, "bias": bias},
        mesh=mesh,
        chunk_size=chunk_size,
        groups=groups,
    )
    d_image, d_bias = row_state["features"], jnp.sum(row_state["bias"])
    d_scale = jnp.sum(image.astype(jnp.float32) * d_image)
    # None: validity and target descriptors are constants.
    d_rows = {"features": (scale * d_image).astype(image.dtype), "valid": None, "target": None}
    d_cols = {"features": (scale * d_text).astype(text.dtype), "valid": None, "target": None}
    return d_scale, d_bias, d_rows, d_cols


# --- Softmax: sums along both axes in one sweep -----------------------------------------------------------


class _SoftmaxSums(NamedTuple):
    """What the cross-entropy of a row (or column) needs of its candidates; logits are counted from the maximum,
    because a loss near 0 is the small difference of large logits."""

    maximum: Array  # of the valid logits
    exp: Array  # sum of exp(logit - maximum): maximum + log(exp) is the log-sum-exp
    logit: Array  # sum of (logit - maximum)
    count: Array  # number of valid candidates
    target: Array  # sum of target weights
    target_logit: Array  # sum of target weight * (logit - maximum)

    @classmethod
    def zeros(cls, size: int) -> _SoftmaxSums:
        return cls(jnp.full(size, _LOWEST), *(jnp.zeros(size) for _ in cls._fields[1:]))

    def add(self, logits, valid, target, axis: int) -> _SoftmaxSums:
        maximum = jnp.maximum(self.maximum, jnp.max(jnp.where(valid, logits, _LOWEST), axis))
        shift = self.maximum - maximum  # _LOWEST - maximum at first, when everything it multiplies is still 0
        centred = jnp.where(valid, logits - jnp.expand_dims(maximum, axis), 0.0)
        return _SoftmaxSums(
            maximum=maximum,
            exp=self.exp * jnp.exp(shift) + jnp.sum(jnp.where(valid, jnp.exp(centred), 0.0), axis),
            logit=self.logit + self.count * shift + jnp.sum(centred, axis),
            count=self.count + jnp.sum(valid, axis),
            target=self.target + jnp.sum(target, axis),
            target_logit=self.target_logit + self.target * shift + jnp.sum(target * centred, axis),
        )

    def contributes(self):
        return self.target > 0

    def log_exp(self):
        return jnp.log(jnp.where(self.count > 0, self.exp, 1.0))

    def cross_entropy(self, label_smoothing: float):
        target_logit = self.target_logit / jnp.where(self.contributes(), self.target, 1.0)
        mean_logit = self.logit / jnp.maximum(self.count, 1.0)
        expected = (1 - label_smoothing) * target_logit + label_smoothing * mean_logit
        return jnp.where(self.contributes(), self.log_exp() - expected, 0.0)

    def backward(self, cotangent, label_smoothing: float) -> dict[str, Array]:
        """d cross_entropy / d logit = softmax * exp(...) - target * t - uniform, with the cotangent multiplied in."""
        cotangent = jnp.where(self.contributes(), cotangent, 0.0)
        return {
            "maximum": self.maximum,
            "log_exp": self.log_exp(),
            "softmax": cotangent,
            "target": (1 - label_smoothing) * cotangent / jnp.where(self.contributes(), self.target, 1.0),
            "uniform": label_smoothing * cotangent / jnp.maximum(self.count, 1.0),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _cross_entropies(target_block, label_smoothing, mesh, chunk_size, groups, scale, rows, cols):
    """((l_i [n], contributes [n]), (l_j [m], contributes [m])) of `softmax_loss`."""
    options = target_block, label_smoothing, mesh, chunk_size, groups
    return _cross_entropies_forward(*options, scale, rows, cols)[0]


def _cross_entropies_forward(target_block, label_smoothing, mesh, chunk_size, groups, scale, rows, cols):
    def block(rows, cols, row_sums, col_sums, shared):
        pairs = _pairs(target_block, rows, cols, shared)
        return row_sums.add(*pairs, axis=1), col_sums.add(*pairs, axis=0)

    row_sums, col_sums = blocked_loop(
        block,
        rows=rows,
        cols=cols,
        row_state=_SoftmaxSums.zeros(len(rows["valid"])),
        col_state=_SoftmaxSums.zeros(len(cols["valid"])),
        shared={"scale": scale, "bias": jnp.zeros(())},
        mesh=mesh,
        chunk_size=chunk_size,
        groups=groups,
    )
    output = tuple((sums.cross_entropy(label_smoothing), sums.contributes()) for sums in (row_sums, col_sums))
    return output, (scale, rows, cols, row_sums, col_sums)


def _cross_entropies_backward(target_block, label_smoothing, mesh, chunk_size, groups, saved, cotangents):
    scale, rows, cols, row_sums, col_sums = saved
    (row_cotangent, _), (col_cotangent, _) = cotangents

    def logit_gradient(rows, cols, shared):
        logits, valid, target = _pairs(target_block, rows, cols, shared)

        def one_direction(sums, axis):
            sums = {name: jnp.expand_dims(value, axis) for name, value in sums.items()}
            softmax = jnp.exp(jnp.where(valid, logits - sums["maximum"] - sums["log_exp"], 0.0))
            return sums["softmax"] * softmax - sums["target"] * target - sums["uniform"]

        both = one_direction(rows["sums"], axis=1) + one_direction(cols["sums"], axis=0)
        return jnp.where(valid, both, 0.0)

    rows = {**rows, "sums": row_sums.backward(row_cotangent, label_smoothing)}
    cols = {**cols, "sums": col_sums.backward(col_cotangent, label_smoothing)}
    d_scale, _, d_rows, d_cols = _gradients(
        logit_gradient, rows, cols, scale, jnp.zeros(()), mesh, chunk_size, groups
    )
    return d_scale, d_rows, d_cols


_cross_entropies.defvjp(_cross_entropies_forward, _cross_entropies_backward)


# --- Sigmoid ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _binary_cross_entropies(target_block, mesh, chunk_size, groups, scale, bias, rows, cols):
    """The binary cross-entropies of `sigmoid_loss` summed for every image [n] and for every text [m]."""

    def block(rows, cols, row_sum, col_sum, shared):
        logits, valid, target = _pairs(target_block, rows, cols, shared)
        # log(1 + exp(s)) - t s, written so that large logits of either sign leave nothing to cancel.
        entropy = jnp.log1p(jnp.exp(-jnp.abs(logits))) + jnp.maximum(logits, 0.0) - target * logits
        entropy = jnp.where(valid, entropy, 0.0)
        return row_sum + entropy.sum(1), col_sum + entropy.sum(0)

    return blocked_loop(
        block,
        rows=rows,
        cols=cols,
        row_state=jnp.zeros(len(rows["valid"])),
        col_state=jnp.zeros(len(cols["valid"])),
        shared={"scale": scale, "bias": bias},
        mesh=mesh,
        chunk_size=chunk_size,
        groups=groups,
    )


def _binary_cross_entropies_forward(target_block, mesh, chunk_size, groups, *operands):
    return _binary_cross_entropies(target_block, mesh, chunk_size, groups, *operands), operands


def _binary_cross_entropies_backward(target_block, mesh, chunk_size, groups, operands, cotangents):
    scale, bias, rows, cols = operands

    def logit_gradient(rows, cols, shared):
        logits, valid, target = _pairs(target_block, rows, cols, shared)
        weight = rows["cotangent"][:, None] + cols["cotangent"][None, :]
        return jnp.where(valid, weight * (jax.nn.sigmoid(logits) - target), 0.0)

    rows, cols = {**rows, "cotangent": cotangents[0]}, {**cols, "cotangent": cotangents[1]}
    return _gradients(logit_gradient, rows, cols, scale, bias, mesh, chunk_size, groups)


_binary_cross_entropies.defvjp(_binary_cross_entropies_forward, _binary_cross_entropies_backward)


# --- The naive twins: the whole matrix, for small batches and for tests -----------------------------------


def naive_softmax_loss(
    image: Float[Array, "n d"],
    text: Float[Array, "m d"],
    *,
    scale: Float[Array, ""] | float,
    targets: TargetsLike = diagonal,
    label_smoothing: float = 0.0,
    direction_weights: tuple[float, float] = (0.5, 0.5),
    image_valid: Bool[Array, " n"] | None = None,
    text_valid: Bool[Array, " m"] | None = None,
    pair_weights: PairWeights | None = None,
    groups: int = 1,
) -> Float[Array, ""]:
    """`softmax_loss` by the whole [n, m] matrix and plain autodiff."""
    rows, cols, targets = _rows_and_cols(image, text, targets, image_valid, text_valid)
    weights = _weights(pair_weights, len(image), len(text))
    logits, valid, target = _pairs(targets.block, rows, cols, {"scale": scale, "bias": 0.0})
    valid, target = _within_groups(valid, target, groups)

    def direction(logits, valid, target, weights):
        contributes = target.sum(1) > 0
        q = target / jnp.where(contributes, target.sum(1), 1.0)[:, None]
        q = (1 - label_smoothing) * q + label_smoothing * valid / jnp.maximum(valid.sum(1), 1)[:, None]
        log_p = jax.nn.log_softmax(jnp.where(valid, logits, _LOWEST), axis=1)
        terms = -jnp.sum(q * jnp.where(valid, log_p, 0.0), axis=1)
        return jnp.sum(jnp.where(contributes, weights * terms, 0.0)) / jnp.maximum(contributes.sum(), 1)

    to_text = direction(logits, valid, target, weights[0])
    to_image = direction(logits.T, valid.T, target.T, weights[1])
    return direction_weights[0] * to_text + direction_weights[1] * to_image


def naive_sigmoid_loss(
    image: Float[Array, "n d"],
    text: Float[Array, "m d"],
    *,
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    targets: TargetsLike = diagonal,
    image_valid: Bool[Array, " n"] | None = None,
    text_valid: Bool[Array, " m"] | None = None,
    pair_weights: PairWeights | None = None,
    groups: int = 1,
) -> Float[Array, ""]:
    """`sigmoid_loss` by the whole [n, m] matrix and plain autodiff."""
    rows, cols, targets = _rows_and_cols(image, text, targets, image_valid, text_valid)
    image_weights, text_weights = _weights(pair_weights, len(image), len(text))
    logits, valid, target = _pairs(targets.block, rows, cols, {"scale": scale, "bias": bias})
    valid, target = _within_groups(valid, target, groups)
    entropy = -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))
    entropy = entropy * (image_weights[:, None] + text_weights[None, :]) / 2
    return jnp.sum(jnp.where(valid, entropy, 0.0)) / jnp.maximum(jnp.sum(rows["valid"]), 1)


def _within_groups(valid, target, groups: int):
    """Validity and target weights of the pairs whose image and text are in one group."""
    image_group, text_group = (jnp.arange(size) // (size // groups) for size in valid.shape)
    valid &= image_group[:, None] == text_group[None, :]
    return valid, jnp.where(valid, target, 0.0)
