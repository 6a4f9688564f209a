"""Texts of regions by a trained model: boxes, points and masks of images, that share each image's encoding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bvl.config import Config
from bvl.data.images import open_image
from bvl.data.region_prompts import prompts_of
from bvl.data.transforms import Transformed, apply
from bvl.decode.options import DecodeOptions
from bvl.errors import UserError
from bvl.mesh import batch_sharding
from bvl.models.features import ImageFeatures, RegionPrompts
from bvl.models.vlm import DualEncoder
from bvl.runs import Components
from bvl.tasks.captioning import check_language_model, check_max_length, name_of, task_of
from bvl.tasks.region_caption import RegionCaption, Visual, behind_images, with_masks
from bvl.tasks.writing_rows import Candidate, row_scales, warn_once, write_rows

# What the null rows of guidance go without.
RegionNull = Literal["image", "region", "both"]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Images encoded once, for several calls of `describe`; see `encode_for_regions`.

    features: what the decoder and the region encoder read. shown: the images as the model has them. sizes: (height,
      width) of the originals.
    """

    features: ImageFeatures
    shown: tuple[Transformed, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.shown)

    def one(self, i: int) -> tuple[ImageFeatures, Transformed, tuple[int, int]]:
        """The features of one image, without the batch axis, the image and its original size."""
        return jax.tree.map(lambda x: x[i], self.features), self.shown[i], self.sizes[i]


def describing_task_of(config: Config) -> RegionCaption:
    """A config's task that describes regions; ConfigError, naming what is missing, if it has none."""
    return task_of(
        config,
        RegionCaption,
        "describe regions",
        "tasks={..., 'region_caption': RegionCaption()}, model.decoder and model.region_encoder set, on records with "
        "boxes, as configs/quickstart.py and configs/own_regions.py do",
    )


def encode_for_regions(
    components: Components, images: Sequence[Any], *, batch_size: int = 16
) -> EncodedImages:
    """What describing regions needs of images: `describe` takes it in their place, with the same result.

    A sweep over scales, and further regions of the same images, so need no further encoding. Holds for these
    components alone. Raises UserError without images.
    """
    images = list(images)
    describing_task_of(components.config)
    _check_batches(images, batch_size)
    parts = list(_encoded(components, images, batch_size))
    features = jax.tree.map(lambda *x: np.concatenate(x), *(part.features for part in parts))
    shown, sizes = (
        tuple(itertools.chain(*x)) for x in zip(*((p.shown, p.sizes) for p in parts), strict=True)
    )
    return EncodedImages(features, shown, sizes)


def describe(
    components: Components,
    images: Sequence[Any] | EncodedImages,
    regions: Sequence[Sequence[Any]],
    *,
    options: DecodeOptions,
    guidance: float | Sequence[Any] | np.ndarray = 1.0,
    guidance_null: RegionNull = "both",
    language_model: Components | None = None,
    controls: Mapping[str, Any] | None = None,
    begin: str | Sequence[Any] | None = None,
    seed: int = 0,
    first_row: int | Sequence[Any] = 0,
    batch_size: int = 32,
    image_batch_size: int = 16,
    always_guided: bool = False,
) -> list[list[list[Candidate]]]:
    """For each image and each of its regions `options.num_return` texts, best first (samples: as drawn).

    Each image is encoded once, and not at all if it has no regions; regions of all images are decoded together,
    batch_size at a time (mask_channel encoders encode an image for each region).

    images: paths, PIL images or arrays, or what `encode_for_regions` made of them.
    regions: a list for each image, empty where there is nothing to describe, of {"box": [x0, y0, x1, y1]}, {"point":
      [x, y]} and {"mask": array [height, width]} in any mix; fractions of the original image.
    guidance, controls ("length", in words), begin: one value, or one a region, as a list for each image or as one list
      of all regions in order.
    guidance_null: what the null rows go without: the "image", the "region" or "both"; the controls they keep.
      language_model: a captioner with the same vocabulary whose text without an image is the null instead.
    seed: of sampling; what a region gets depends on the seed and its number alone. first_row: number of the first
      region, where the others count on from, or one number a region.
    always_guided: decode null rows even at scale 1, so that a sweep over scales compiles one program.
    Raises ConfigError for a run that does not describe regions, UserError for values that cannot be used.
    """
    describing_task_of(components.config)
    images = images if isinstance(images, EncodedImages) else list(images)
    _check_batches(images, min(batch_size, image_batch_size))
    counts = _counts(images, regions)
    check_max_length(components.config, options, of_regions=True)
    if guidance_null not in ("image", "region", "both"):
        raise UserError(f"guidance_null={guidance_null!r}: choose image, region or both")
    check_language_model(components, language_model, options)
    scale = row_scales(_flat("guidance", guidance, counts), sum(counts), noun="region")
    if language_model is None and (scale != 1).any():
        _warn_of_untrained_null(components.config, guidance_null)
    rows_in_order = _rows(components, images, regions, image_batch_size)

    def visual_of(rows: Int[np.ndarray, " b"], with_null: bool) -> Visual:
        new = list(itertools.islice(rows_in_order, len(np.unique(rows))))
        # Regions of one image have its features side by side: one shape for any mix.
        features, pixels, prompts = jax.tree.map(lambda *x: np.stack(x), *(new[i - rows[0]] for i in rows))
        masked = None
        if components.config.model.region_encoder.kind == "mask_channel":
            four = with_masks(pixels, prompts.mask)[:, 0]
            masked = components.encoder.image(components.params["model"], four, need=frozenset({"tokens"}))
        return _region_visual(
            components.params["model"],
            features.replace(grid=None),
            None if masked is None else masked.tokens,
            prompts,
            mesh=components.encoder.mesh,
            model=components.model,
            grid=features.grid,
            null=guidance_null if with_null else None,
        )

    written = iter(
        write_rows(
            components,
            visual_of,
            options=options,
            scale=scale,
            null_has_controls=True,
            language_model=language_model,
            controls=_region_controls(controls or {}, counts),
            begin=_flat("begin", begin, counts),
            seed=seed,
            first_row=_flat("first_row", first_row, counts),
            batch_size=batch_size,
            always_guided=always_guided,
            noun="region",
        )
    )
    return [list(itertools.islice(written, count)) for count in counts]


@functools.partial(jax.jit, static_argnames=("mesh", "model", "grid", "null"))
def _region_visual(
    params: Any,
    features: ImageFeatures,
    masked: Float[Array, "b l d"] | None,
    prompts: RegionPrompts,
    *,
    mesh: Mesh,
    model: DualEncoder,
    grid: tuple[int, int],
    null: RegionNull | None,
) -> tuple[Float[Array, "c s w"], Bool[Array, "c s"]]:
    """What the decoder sees of b regions, one of each image, and then of their null rows if there are any.

    masked: tokens of the images with the regions' masks, for encoders that read these instead.
    """
    features, masked, prompts = jax.lax.with_sharding_constraint(
        (features, masked, prompts), batch_sharding(mesh)
    )
    bound = functools.partial(model.apply, {"params": params})
    tokens = features.tokens if masked is None else masked

    def rows(image_dropped: bool, region_dropped: bool) -> Visual:
        # Constants, so that what is dropped is not computed.
        absent_image, absent_region = (jnp.full(len(tokens), x) for x in (image_dropped, region_dropped))
        image = bound(features.tokens, absent_image, method="visual_tokens")
        region = bound(tokens, features.levels, grid, prompts, absent_region, method="region_tokens")
        return behind_images(image, region)

    given = rows(False, False)
    if null is None:
        return given
    return tuple(
        jnp.concatenate(pair) for pair in zip(given, rows(null != "region", null != "image"), strict=True)
    )


def _encoded(components: Components, images: list[Any], batch_size: int) -> Iterator[EncodedImages]:
    """Up to batch_size images at a time."""
    # Encoding is what a few regions cost most: not 16 images for one, and yet few programs.
    batch_size = min(batch_size, 1 << (len(images) - 1).bit_length())
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        opened = [open_image(image) for image in chunk]
        sizes = tuple(image.size[::-1] for image in opened)
        shown = tuple(apply(image, preprocess=components.preprocess) for image in opened)
        # Pixels of the model's size are taken as they are.
        pixels = [one.image for one in shown]
        (features,) = components.encode_images(pixels, frozenset({"tokens", "regions"}), batch_size)
        yield EncodedImages(features, shown, sizes)


def _rows(
    components: Components,
    images: Sequence[Any] | EncodedImages,
    regions: Sequence[Sequence[Any]],
    batch_size: int,
) -> Iterator[tuple[ImageFeatures, np.ndarray, RegionPrompts]]:
    """Features and pixels of the image and the prompt of each region, in order; images are encoded when due."""
    wanted = [i for i, some in enumerate(regions) if len(some)]
    if isinstance(images, EncodedImages):
        each = (images.one(i) for i in wanted)
    else:
        parts = _encoded(components, [images[i] for i in wanted], batch_size)
        each = (part.one(i) for part in parts for i in range(len(part)))
    grid = components.config.data.regions.grid(components.preprocess.height_width)
    for i, (features, shown, size) in zip(wanted, each, strict=True):
        found = prompts_of(shown, image_size=size, mask_size=grid, regions=regions[i], where=f"images[{i}]")
        names = ("region_box", "region_point", "region_mask", "region_kind")
        for k in range(len(regions[i])):
            yield features, shown.image, RegionPrompts(*(found[name][k : k + 1] for name in names))


def _check_batches(images: Sequence[Any] | EncodedImages, batch_size: int) -> None:
    if not len(images):
        raise UserError("no images to describe regions of: give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")


def _counts(images: Sequence[Any] | EncodedImages, regions: Sequence[Sequence[Any]]) -> list[int]:
    """How many regions each image has."""
    if len(regions) != len(images):
        raise UserError(
            f"regions of {len(regions)} images for {len(images)} images: give a list of regions for each image, empty "
            "where there is none"
        )
    counts = [len(some) for some in regions]
    if not sum(counts):
        raise UserError("no regions to describe: give at least one box, point or mask")
    return counts


def _region_controls(controls: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    given = {name: value for name, value in controls.items() if value is not None}
    wrong = sorted(given.keys() - {"length"})
    if wrong:
        raise UserError(
            f"{wrong[0]}={given[wrong[0]]!r}: texts of regions are trained with one control, their length"
        )
    return {name: _flat(name, value, counts) for name, value in given.items()}


def _flat(name: str, value: Any, counts: Sequence[int]) -> Any:
    """`value` with the lists of the images, if it holds such, made one list of all regions."""
    lists = (list, tuple, np.ndarray)
    if not isinstance(value, lists) or not any(isinstance(x, lists) for x in value):
        return value
    found = [len(x) if isinstance(x, lists) else None for x in value]
    if found != list(counts):
        raise UserError(
            f"{name}: lists of {found} values for images with {list(counts)} regions; give one value, or one for each "
            "region"
        )
    return [x for some in value for x in some]


def _warn_of_untrained_null(config: Config, guidance_null: RegionNull) -> None:
    """Warn, once for a run, of a null that training has never shown."""
    task = describing_task_of(config)
    for name in ("image", "region"):
        if guidance_null in (name, "both") and not getattr(task, f"{name}_dropout"):
            warn_once(
                config.workdir,
                f"guidance: this run was trained with {name}_dropout=0, so its null {name} means nothing; train with "
                f"tasks.{name_of(config, task)}.{name}_dropout=0.1",
            )
