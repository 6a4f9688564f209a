"""Parameters by name: which are trained, how deep in a tower each stands, and the groups that norms are logged for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

# Batch norms write these themselves (as values sown in "statistics"); no gradient leads to them.
STATISTICS = re.compile(r"running_(mean|var)$")
TOWERS = ("model/image/", "model/text/", "model/decoder/")
# How a decoder sees images, which a language model has yet to learn.
SEES = r"^model/decoder/(visual_tokens|block_\d+/(cross(_norm)?|visual_norm|image_mlp(_norm)?))/"
# What the names of low-rank factors begin with; the kernel's own name follows (bvl/train/lora.py).
LORA = "lora/"

_LAYER = re.compile(r"(stage|layer|block)_(\d+)(?:_block_(\d+))?")
# What follows the last layer of a tower; all else outside the layers embeds its input.
_TOP = re.compile(r"((unimodal_)?norm|(attentional_)?pool|pooler|head)$")
# A hybrid embeds the patches of its second last stage's map: part of the last stage's first layer.
_BETWEEN_STAGES = re.compile(r"patch_|positions$")


def parameter_name(path: tuple[Any, ...]) -> str:
    """ "model/image/..." for a tree path; the boxes that carry axis names add nothing."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def named_leaves(tree: Any, *, boxed: bool = False) -> dict[str, Any]:
    """Name -> leaf; with `boxed` the boxes that carry axis names are the leaves."""
    is_leaf = (lambda x: isinstance(x, nn.Partitioned)) if boxed else None
    return {parameter_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_by_name(function: Callable[[str, Any], Any], tree: Any, *rest: Any) -> Any:
    """`function(name, leaf, *leaves of rest)` for every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(parameter_name(path), *leaves), tree, *rest
    )


def split(params: Any, first: Callable[[str], bool]) -> tuple[Any, Any]:
    """(parameters whose name is `first`, the others): both of the whole's structure, with None where the other has it.

    None is an empty subtree to JAX, so that neither gradients nor optimiser state exist for it.
    """

    def keep(wanted: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if first(parameter_name(path)) == wanted else None,
            params,
            is_leaf=lambda x: isinstance(x, nn.Partitioned),
        )

    return keep(True), keep(False)


def merge(a: Any, b: Any) -> Any:
    """The whole that `split` took apart."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def is_matrix(name: str, x: Any) -> bool:
    """Whether a parameter has two axes or more; a stack of layers has one more than each of its layers."""
    return len(x.shape) - ("/blocks/" in name) >= 2


def group_of(name: str) -> str:
    """The group that norms are logged for: "image", "text", "projections", "logits", "heads/<task>"."""
    parts = name.removeprefix(LORA).split("/")
    if parts[0] == "heads":
        return "/".join(parts[:2])
    if parts[1].endswith("_projection"):
        return "projections"
    return "logits" if parts[1] in ("log_scale", "logit_bias") else parts[1]


def layer_factors(shapes: dict[str, tuple[int, ...]], decay: float) -> dict[str, float | np.ndarray]:
    """name -> decay ** (layers between the parameter and its tower's end), for the parameters of towers and decoder.

    With n layers the embeddings get decay ** (n + 1), layer i of 0..n-1 decay ** (n - i), the last norm, the pooling,
    how a decoder sees images and all outside the towers 1 (BEiT: Bao et al. 2022, arXiv:2106.08254, appendix). A layer is a `block_i` of a
    transformer or a `stage_i_block_j` of a ResNet or hybrid, in the order of the numbers; scanned `blocks` get one
    factor for each entry of their leading axis. What embeds a hybrid's patches has the rate of the block above it.
    Low-rank factors have their kernel's.
    """
    if low_rank := {name: shape for name, shape in shapes.items() if name.startswith(LORA)}:
        plain = {name: shape for name, shape in shapes.items() if name not in low_rank}
        kernels = layer_factors(plain, decay)
        of_factors = {name: kernels.get(name[len(LORA) :].rpartition("/")[0], 1.0) for name in low_rank}
        return kernels | of_factors
    factors: dict[str, float | np.ndarray] = {}
    for tower in TOWERS:
        layers = {
            name: _layers_of(name.removeprefix(tower), shape)
            for name, shape in shapes.items()
            if name.startswith(tower) and not re.match(SEES, name)
        }
        stages = [layer for found in layers.values() for layer in found if not layer[0]]
        for name in layers:
            if stages and _BETWEEN_STAGES.match(name.removeprefix(tower)):
                layers[name] = [(False, max(stages)[1], 0)]
        order = sorted({layer for found in layers.values() for layer in found})
        for name, found in layers.items():
            if not found:
                factors[name] = (
                    1.0 if _TOP.match(name.removeprefix(tower).split("/")[0]) else decay ** (len(order) + 1)
                )
                continue
            powers = np.asarray([decay ** (len(order) - order.index(layer)) for layer in found], np.float32)
            scanned = "/blocks/" in name
            factors[name] = (
                powers.reshape(-1, *[1] * (len(shapes[name]) - 1)) if scanned else float(powers[0])
            )
    return factors


def _layers_of(name: str, shape: Sequence[int]) -> list[tuple[bool, int, int]]:
    """The layers, as sortable keys, that a tower's parameter belongs to: none, one, or all of a scanned stack."""
    for part in name.split("/"):
        if part == "blocks":
            return [(True, i, 0) for i in range(shape[0])]
        if found := _LAYER.fullmatch(part):
            return [(found[1] == "block", int(found[2]), int(found[3] or 0))]
    return []
