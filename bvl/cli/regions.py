"""bvl describe, bvl ground, bvl segment, bvl detect: the regions of one image."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvl.cli.options import (
    DECODING,
    add_verb,
    checkpoint,
    checkpoint_of,
    decoding,
    decoding_given,
    picture_path,
    positive,
)
from bvl.cli.results import file_names, print_line, save_picture
from bvl.errors import ConfigError, UserError

# Controls that texts of regions are not trained with, and the choice among candidates by likeness to a whole image.
OF_IMAGES = ("section", "quality", "prompt", "best_of", "scorer")


def add_regions(verbs) -> None:
    """Add the verbs that read or find regions."""
    describe = add_verb(
        verbs,
        "describe",
        _describe,
        "write a text for each region of an image",
        "bvl describe runs/quickstart scan.png --box 0.1,0.2,0.5,0.6 --length 6 --out overlay.png",
    )
    _run_and_image(describe)
    for flag, kind, metavar, text in (
        ("--box", _box, "X0,Y0,X1,Y1", "a box in fractions of the image, x to the right and y down"),
        ("--point", _point, "X,Y", "a point in fractions of the image"),
        (
            "--mask",
            _mask,
            "PNG",
            "a mask of the image's size: of one region, or with an id for each; 0 is none",
        ),
    ):
        describe.add_argument(
            flag,
            type=kind,
            action="append",
            dest="regions",
            metavar=metavar,
            help=f"{text}; may be given again",
        )
    _overlay(describe)
    decoding(
        describe,
        *(name for name in DECODING if name not in OF_IMAGES),
        guidance_null='what the null of guidance goes without: "image", "region" or "both" (default)',
        begin="first words of every text",
    )
    checkpoint(describe)

    ground = add_verb(
        verbs,
        "ground",
        _ground,
        "find phrases in an image, or say that they are not there",
        'bvl ground runs/quickstart scan.png "left lung" "a nodule" --out overlay.png',
    )
    _run_and_image(ground)
    _phrases(ground)
    ground.add_argument(
        "--heat-map",
        action="store_true",
        help="also paint how like each patch is to the phrase, a picture a phrase; for a run that was trained without "
        "boxes this is all there is",
    )
    _overlay(ground)
    checkpoint(ground)

    segment = add_verb(
        verbs,
        "segment",
        _segment,
        "find the pixels of phrases in an image",
        'bvl segment runs/quickstart scan.png "left lung" --masks masks --out overlay.png',
    )
    _run_and_image(segment)
    _phrases(segment)
    segment.add_argument("--masks", metavar="DIR", help="write a mask of each phrase there, 0 and 255")
    _overlay(segment)
    checkpoint(segment)

    detect = add_verb(
        verbs,
        "detect",
        _detect,
        "find the objects in an image that go by the given names",
        'bvl detect runs/quickstart smear.png "red blood cell" platelet --threshold 0.3 --out overlay.png',
    )
    _run_and_image(detect)
    detect.add_argument("names", nargs="+", metavar="NAME", help="any texts")
    detect.add_argument(
        "--threshold", type=_share, default=0.3, metavar="X", help="least score (default 0.3)"
    )
    detect.add_argument(
        "--iou-threshold",
        type=_share,
        default=0.5,
        metavar="X",
        help="of two boxes of one name that overlap more the better one stays (default 0.5)",
    )
    detect.add_argument(
        "--max-detections", type=positive, default=100, metavar="N", help="objects at most (default 100)"
    )
    _overlay(detect)
    checkpoint(detect)


def _run_and_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("image", metavar="IMAGE", help="image file")


def _phrases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="what to look for")
    parser.add_argument(
        "--alpha",
        type=_share,
        default=0.1,
        metavar="X",
        help="share of absent phrases that may pass for found (default 0.1), for a run with calibration.json",
    )


def _overlay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="PICTURE", help="draw the result on the image, such as overlay.png")


def _describe(args: argparse.Namespace) -> int:
    from bvl.data.drawing import draw_regions

    image, out = _before_loading(args)
    shown, regions = _regions(args.regions or [], (image.height, image.width))
    options = decoding_given(args)
    model = _load(args)
    if "language_model" in options:
        from bvl.api import load

        options["language_model"] = load(options["language_model"])
    # A power of two: few programs to compile, and few rows that are not asked for.
    batch_size = min(32, 1 << (len(regions) - 1).bit_length())
    (texts,) = model.describe(
        [image], regions=[regions], batch_size=batch_size, image_batch_size=1, **options
    )
    for row, text in zip(shown, texts, strict=True):
        print_line({**row, "text": text})
    kinds = {
        f"{kind}{'es' if kind == 'box' else 's'}": [region.get(kind) for region in regions]
        for kind in ("box", "point", "mask")
    }
    save_picture(out, lambda: draw_regions(image, texts=texts, **kinds))
    return 0


def _ground(args: argparse.Namespace) -> int:
    import numpy as np

    from bvl.data.drawing import draw_regions, side_by_side
    from bvl.tasks.locating import grounding_task_of

    image, out = _before_loading(args)
    if args.heat_map and out is None:
        raise UserError("--heat-map is a picture: say with --out where to write it")
    model = _load(args)
    rows: list[dict[str, Any]] = [{"phrase": phrase} for phrase in args.phrases]
    found = None
    try:
        grounding_task_of(model.config)
    except ConfigError:
        if not args.heat_map:
            raise
    else:
        (found,) = model.ground([image], args.phrases, alpha=args.alpha, batch_size=1)
        for i, row in enumerate(rows):
            row |= {"found": bool(found.found[i]), "score": found.scores[i], "p_value": found.p_values[i]}
            row["box"] = found.boxes[i]
    heat_maps = None
    if args.heat_map:
        (heat_maps,) = model.heat_maps([image], args.phrases, batch_size=1)
        for row, heat in zip(rows, heat_maps, strict=True):
            y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
            row |= {
                "peak": [(x + 0.5) / image.width, (y + 0.5) / image.height],
                "similarity": heat[y, x],
            }
    for row in rows:
        print_line(row)

    def draw(members: Sequence[int], heat_map: Any = None) -> Any:
        there = [i for i in members if found is not None and found.found[i]]
        missing = [args.phrases[i] for i in members if found is not None and not found.found[i]]
        notes = _not_found(missing)
        if found is None:
            notes = [args.phrases[i] for i in members]
        return draw_regions(
            image,
            boxes=[found.boxes[i] for i in there] if there else [],
            texts=[args.phrases[i] for i in there],
            scores=[found.scores[i] for i in there],
            heat_map=heat_map,
            notes=notes,
        )

    if heat_maps is None:
        save_picture(out, lambda: draw(range(len(rows))))
    else:
        save_picture(out, lambda: side_by_side([draw([i], heat) for i, heat in enumerate(heat_maps)]))
    return 0


def _segment(args: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    from bvl.data.drawing import draw_regions
    from bvl.data.regions import tight_box
    from bvl.tasks.locating import check_finds_masks, locate, presence_judge

    image, out = _before_loading(args)
    folder = None if args.masks is None else Path(args.masks)
    if folder is not None and not (folder.is_dir() or (folder.parent.is_dir() and not folder.exists())):
        raise UserError(f"--masks {folder}: no folder, and none can be made there")
    model = _load(args)
    check_finds_masks(model.config)
    judge = presence_judge(model.components, args.alpha)
    # Masks and presence of one pass, also of a run without boxes.
    (located,) = locate(model.components, [image], args.phrases, batch_size=1)
    scores, p_values, found = judge(located.presence)
    masks = [p >= 0.5 for p in located.masks()]
    if folder is not None:
        folder.mkdir(exist_ok=True)
    files = [None if folder is None else folder / name for name in file_names(args.phrases)]
    for i, (phrase, mask, file) in enumerate(zip(args.phrases, masks, files, strict=True)):
        presence = {"found": bool(found[i]), "score": scores[i], "p_value": p_values[i]}
        row = {"phrase": phrase, **presence, "area": mask.mean()}
        row["box"] = tight_box(mask) if mask.any() else None
        if file is not None:
            Image.fromarray(mask.astype(np.uint8) * 255).save(file)
            row["mask"] = str(file)
        print_line(row)
    there = np.flatnonzero(found)
    save_picture(
        out,
        lambda: draw_regions(
            image,
            masks=[masks[i] for i in there],
            texts=[args.phrases[i] for i in there],
            scores=scores[there],
            notes=_not_found([args.phrases[i] for i in np.flatnonzero(~found)]),
        ),
    )
    return 0


def _detect(args: argparse.Namespace) -> int:
    from bvl.data.drawing import draw_regions
    from bvl.data.phrases import read_mark

    image, out = _before_loading(args)
    model = _load(args)
    (found,) = model.detect(
        [image],
        args.names,
        threshold=args.threshold,
        iou_threshold=args.iou_threshold,
        max_detections=args.max_detections,
        batch_size=1,
    )
    for name, box, score in zip(found.names, found.boxes, found.scores, strict=True):
        print_line({"name": name, "box": box, "score": score})
    names = dict.fromkeys(read_mark(name)[0] for name in args.names)
    missing = [name for name in names if name not in found.names]
    if not found.names:
        print(f"nothing found with a score of {args.threshold} or more", file=sys.stderr)
    save_picture(
        out,
        lambda: draw_regions(
            image,
            boxes=found.boxes,
            masks=None if found.masks is None else found.masks >= 0.5,
            texts=found.names,
            scores=found.scores,
            groups=found.names,
            notes=_not_found(missing),
        ),
    )
    return 0


def _before_loading(args: argparse.Namespace) -> tuple[Any, Path | None]:
    """The image and the place of the overlay: whatever is wrong with them is said before the model is loaded."""
    from bvl.data.images import open_image

    out = None if args.out is None else picture_path(args.out)
    return open_image(args.image), out


def _load(args: argparse.Namespace) -> Any:
    from bvl.api import load
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    return load(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))


def _regions(
    given: Sequence[dict[str, Any]], size: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is shown of each region, and the regions as `Model.describe` takes them; a file of ids holds several.

    size: (height, width) of the image. Raises UserError for a region that cannot be used.
    """
    import numpy as np

    from bvl.data.images import load_mask
    from bvl.data.region_prompts import check_boxes, check_masks, check_points

    shown, regions = [], []
    for region in given:
        ((kind, value),) = region.items()
        if kind == "mask":
            ids = load_mask(value)
            check_masks([ids != 0], size, f"--mask {value}")
            for i in np.unique(ids[ids != 0]).tolist():
                shown.append({"mask": value, "id": i})
                regions.append({"mask": ids == i})
            continue
        (checked,) = check_boxes([value], "--box") if kind == "box" else check_points([value], "--point")
        shown.append({kind: checked})
        regions.append({kind: checked})
    if not regions:
        raise UserError("zero regions: give at least one --box, --point or --mask")
    return shown, regions


def _not_found(phrases: Sequence[str]) -> list[str]:
    return [f"not found: {', '.join(phrases)}"] if phrases else []


def _numbers(text: str, count: int, example: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers with commas, such as {example}")
    return numbers


def _box(text: str) -> dict[str, Any]:
    return {"box": _numbers(text, 4, "0.1,0.2,0.5,0.6")}


def _point(text: str) -> dict[str, Any]:
    return {"point": _numbers(text, 2, "0.3,0.4")}


def _mask(text: str) -> dict[str, Any]:
    return {"mask": text}


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value
