"""The proof of a conversion: both models read the same probes, and every layer and output is compared, in float32."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bvl.assembly import build_model
from bvl.config import Config
from bvl.convert.families import Family, Layer, Tower
from bvl.convert.peers import import_peer
from bvl.convert.table import flat_params, nested_params, split_layers
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import MlmTransform
from bvl.models.vlm import DualEncoder


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What may differ. embed: absolute, of embeddings of unit norm; relative: of anything else, max|a - b| / max|b|.

    Both come from float32 sums in another order, which for these sizes stay ten times below.
    """

    embed: float = 2e-5
    relative: float = 1e-4


TOLERANCE = Tolerance()


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a layer or an output of ours lies from theirs, for one probe."""

    tower: str
    probe: str
    ours: str
    theirs: str
    absolute: float
    relative: float
    within: bool


@dataclasses.dataclass(frozen=True)
class Probe:
    """Fixed inputs. pixels: normalised [b, h, w, 3]; tokens and mask [b, t]."""

    name: str
    pixels: Float[np.ndarray, "b h w 3"] | None = None
    tokens: Int[np.ndarray, "b t"] | None = None
    mask: Bool[np.ndarray, "b t"] | None = None


def prove(
    config: Config,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    family: Family,
    foreign: Mapping[str, Any],
    folder: Path,
    *,
    tolerance: Tolerance = TOLERANCE,
) -> list[Difference]:
    """Every difference between our model and the folder's as its own library loads it, tower by tower.

    foreign: the folder's config. Raises ConversionError where the library cannot load the folder.
    """
    torch = import_peer("torch", what="the proof")
    ours = _Ours(config, params, tokenizer)
    peer = family.load_peer(folder, foreign)
    differences: list[Difference] = []
    embeds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for tower in family.towers(config.model, foreign):
        for probe in probes_of(tower, config, tokenizer):
            theirs = _run_peer(torch, tower, peer, probe)
            found = ours.run(tower, probe)
            for layer in (*tower.layers, *_outputs(tower, theirs, found)):
                a, b = found[layer.ours], theirs[layer.theirs or layer.ours]
                differences.append(_difference(tower, probe, layer, a, b, tolerance))
            if "embed" in theirs and tower.name not in embeds:
                embeds[tower.name] = found["embed"], theirs["embed"]
            del theirs, found
            gc.collect()
    scale = family.scale_and_bias(peer)
    if scale is not None and len(embeds) == 2:
        differences.append(_logits(ours, embeds, scale, tolerance))
    return differences


def probes_of(tower: Tower, config: Config, tokenizer: Tokenizer) -> Iterator[Probe]:
    """The probes of a tower: two images in its own size and each further one; a short, a long and a padded text."""
    rng = np.random.default_rng(0)
    size = config.data.preprocess.height_width
    texts: dict[str, np.ndarray] = {}
    reads_images = tower.name == "image" or (tower.name == "decoder" and config.model.image is not None)
    if tower.name != "image":
        texts["tokens"], texts["mask"] = probe_texts(tokenizer, rng)
    for h, w in (size, *tower.sizes) if reads_images else (size,):
        pixels = rng.normal(size=(2, h, w, 3)).astype(np.float32) if reads_images else None
        if texts and pixels is not None:
            pixels = np.concatenate([pixels, pixels[:1]])
        name = f"{len(pixels)} images of {h} x {w}" if tower.name == "image" else "short, long, padded texts"
        yield Probe(name, pixels, **texts)


def probe_texts(
    tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "3 t"], Bool[np.ndarray, "3 t"]]:
    """Token ids and mask of a text of one word, one that fills the context, and one of half its length."""
    words = np.setdiff1d(np.arange(tokenizer.vocab_size), [*tokenizer.special_ids, tokenizer.mask_id or 0])
    if not len(words):
        words = np.arange(tokenizer.vocab_size)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    length = tokenizer.context_length
    tokens = np.full((3, length), tokenizer.pad_id, np.int32)
    mask = np.zeros((3, length), bool)
    room = length - len(start) - 1
    for row, count in enumerate((1, room, max(room // 2, 1))):
        ids = [*start, *rng.choice(words, count), tokenizer.end_id]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


class _Ours:
    """Our model, its scanned stacks taken apart, so that every layer has a name; compiled once a tower and shape."""

    def __init__(self, config: Config, params: Mapping[str, Any], tokenizer: Tokenizer):
        def plain(tower: Any) -> Any:
            names = {f.name for f in dataclasses.fields(tower)} if tower is not None else set()
            changes = {"scan": False, "remat": "none"}
            changes = {name: value for name, value in changes.items() if name in names}
            return dataclasses.replace(tower, **changes) if changes else tower

        model = config.model
        model = dataclasses.replace(
            model, image=plain(model.image), text=plain(model.text), decoder=plain(model.decoder)
        )
        self.config = dataclasses.replace(config, model=model, precision="float32")
        self.model: DualEncoder = build_model(self.config, tokenizer)
        flat = {name: np.asarray(x) for name, x in flat_params(params).items()}
        self.params = nested_params(split_layers(flat))["model"]
        self.mlm_head = (params.get("heads") or {}).get("mlm")

    def run(self, tower: Tower, probe: Probe) -> dict[str, np.ndarray]:
        """The outputs of every layer of a tower by its path, and the tower's outputs by their names."""
        wanted = {layer.ours for layer in tower.layers}

        def forward(params, pixels, tokens, mask):
            outputs, state = self.model.apply(
                {"params": params},
                pixels,
                tokens,
                mask,
                method=getattr(self, f"_{tower.name}"),
                mutable=["intermediates"],
                capture_intermediates=lambda module, name: (
                    name == "__call__" and "/".join(module.path) in wanted
                ),
            )
            if tower.name == "text" and self.mlm_head is not None:
                outputs["logits"] = self._mlm_logits(params, outputs["tokens"])
            return outputs, state.get("intermediates", {})

        with jax.default_matmul_precision("highest"):
            outputs, captured = jax.jit(forward)(self.params, probe.pixels, probe.tokens, probe.mask)
        layers = {path: _at(captured, path) for path in wanted}
        return {name: np.asarray(x, np.float32) for name, x in {**outputs, **layers}.items() if x is not None}

    def _mlm_logits(self, params: Any, hidden: Float[jax.Array, "b t d"]) -> Float[jax.Array, "b t v"]:
        """What the head of the task "mlm" makes of hidden states (bvl/tasks/mlm.py)."""
        task, head = self.config.tasks["mlm"], self.mlm_head
        hidden = MlmTransform(task.norm_epsilon, task.activation).apply({"params": head["transform"]}, hidden)
        return hidden @ params["text"]["token_embed"].T + head["bias"]["bias"]

    def scale_and_bias(self) -> tuple[float, float]:
        scale, bias = self.model.apply({"params": self.params}, method="logit_scale_and_bias")
        return float(scale), float(bias)

    @staticmethod
    def _image(model: DualEncoder, pixels, tokens, mask) -> dict[str, Any]:
        out = model.encode_image(pixels, frozenset({"embed", "pooled", "tokens"}))
        return {"embed": out.embed, "pooled": out.pooled, "tokens": out.tokens}

    @staticmethod
    def _text(model: DualEncoder, pixels, tokens, mask) -> dict[str, Any]:
        out = model.encode_text(tokens, mask, frozenset({"embed", "pooled", "tokens"}))
        return {"embed": out.embed, "pooled": out.pooled, "tokens": out.tokens}

    @staticmethod
    def _decoder(model: DualEncoder, pixels, tokens, mask) -> dict[str, Any]:
        visual, visual_mask = None, None
        if pixels is not None:
            features = model.encode_image(pixels, frozenset({"visual"}))
            visual, visual_mask = model.visual_tokens(features.for_decoder, jnp.zeros(len(pixels), bool))
        hidden = model.decode_train(visual, visual_mask, tokens, mask)
        return {"logits": hidden @ model.vocabulary().T}


def _at(captured: Mapping[str, Any], path: str) -> jax.Array:
    node: Any = captured
    for key in (*path.split("/"), "__call__"):
        if key not in node:
            raise ConversionError(f"the proof names the layer {path}, which the model does not run")
        node = node[key]
    found = node[0]
    return found[0] if isinstance(found, tuple) else found


def _run_peer(torch: Any, tower: Tower, peer: Any, probe: Probe) -> dict[str, np.ndarray]:
    """The outputs of the peer's modules by their names, and of the tower by ours."""
    caught: dict[str, Any] = {}
    hooks = []

    def catch(name: str):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple | list) else output
            caught.setdefault(name, getattr(output, "last_hidden_state", output))

        return hook

    inputs: dict[str, Any] = {}
    if probe.pixels is not None:
        inputs["pixels"] = torch.from_numpy(np.ascontiguousarray(probe.pixels.transpose(0, 3, 1, 2)))
    if probe.tokens is not None:
        inputs["tokens"] = torch.from_numpy(probe.tokens.astype(np.int64))
        inputs["mask"] = torch.from_numpy(probe.mask.astype(np.int64))
    try:
        for layer in tower.layers:
            hooks.append(peer.get_submodule(layer.theirs).register_forward_hook(catch(layer.theirs)))
        with torch.inference_mode():
            outputs = tower.run(peer, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [layer.theirs for layer in tower.layers if layer.theirs not in caught]
    if missing:
        raise ConversionError(f"the proof names the layers {', '.join(missing)}, which the peer does not run")
    return {name: x.detach().float().numpy() for name, x in {**caught, **outputs}.items()}


def _outputs(tower: Tower, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Layer]:
    """What both towers give beside their layers."""
    modules = {layer.theirs for layer in tower.layers}
    names = [name for name in theirs if name not in modules]
    unknown = [name for name in names if name not in ours]
    if unknown:
        raise ConversionError(
            f"the proof of the {tower.name} tower names {', '.join(unknown)}, which bvl has not"
        )
    return [Layer(name, "") for name in names]


def _difference(
    tower: Tower, probe: Probe, layer: Layer, ours: np.ndarray, theirs: np.ndarray, tolerance: Tolerance
) -> Difference:
    if layer.how == "nchw":
        theirs = np.moveaxis(theirs, 1, -1)
    theirs = theirs[:, layer.skip :] if layer.skip else theirs
    if ours.shape != theirs.shape and ours.size == theirs.size and len(ours) == len(theirs):
        theirs = theirs.reshape(ours.shape)  # a map, and the same as a list of tokens
    if ours.shape != theirs.shape:
        raise ConversionError(
            f"the proof compares {layer.ours} {ours.shape} with {layer.theirs or 'the same'} {theirs.shape}"
        )
    if probe.mask is not None and ours.ndim > 2 and ours.shape[:2] == probe.mask.shape:
        # What stands at padding is read by nobody.
        ours, theirs = (x * probe.mask[..., None] for x in (ours, theirs))
    absolute = float(np.abs(ours - theirs).max())
    relative = absolute / max(float(np.abs(theirs).max()), 1e-30)
    within = absolute <= tolerance.embed if layer.ours == "embed" else relative <= tolerance.relative
    return Difference(tower.name, probe.name, layer.ours, layer.theirs, absolute, relative, within)


def _logits(
    ours: _Ours,
    embeds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    scale_and_bias: tuple[float, float],
    tolerance: Tolerance,
) -> Difference:
    logits = []
    for side, (scale, bias) in enumerate((ours.scale_and_bias(), scale_and_bias)):
        logits.append(scale * embeds["image"][side] @ embeds["text"][side].T + bias)
    absolute = float(np.abs(logits[0] - logits[1]).max())
    # Of the range that logits can have: near 0 a cosine has no relative precision.
    relative = absolute / max(abs(scale_and_bias[0]) + abs(scale_and_bias[1]), 1e-30)
    return Difference(
        "both",
        "every image with every text",
        "logits",
        "",
        absolute,
        relative,
        relative <= tolerance.relative,
    )
