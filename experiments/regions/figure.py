"""What the models of the experiments on regions predict, beside the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import bvl
from bvl.data.drawing import draw_regions, side_by_side
from bvl.data.sources import RecordSet, Source
from bvl.metrics.boxes import pairwise_iou
from bvl.metrics.masks import dice

NUM_IMAGES = 12
# Looked through for the best and the worst.
NUM_CANDIDATES = 100
FULL_LENGTH = 7


def draw_set(name: str, run: Path, source: Source, out: Path) -> None:
    """Twelve held-out images, truth on the left and prediction on the right: the six best and the six worst."""
    model, records = bvl.load(run), RecordSet(source)
    loaded = [records.load(i, mask=True) for i in range(min(len(records), NUM_CANDIDATES))]
    loaded = [record for record in loaded if record.get("boxes")]
    pairs = sorted(_PREDICT[name](model, loaded), key=lambda pair: -pair[0])
    half = NUM_IMAGES // 2
    shown = pairs[:half] + pairs[-half:]
    tiles = [side_by_side([truth, prediction]) for _, truth, prediction in shown]
    _sheet(tiles).save(out, quality=85)


def _sheet(tiles: list[Image.Image], columns: int = 3, width: int = 560) -> Image.Image:
    tiles = [t.resize((width, round(t.height * width / t.width)), Image.Resampling.LANCZOS) for t in tiles]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    gap = 12
    heights = [max(t.height for t in row) for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (width + gap), top))
        top += height + gap
    return sheet


def _truth(record: dict, *, masks: bool = False) -> Image.Image:
    boxes = record["boxes"]
    names = [b["name"] for b in boxes]
    own = [record["mask"] == k + 1 for k in range(len(boxes))] if masks else None
    return draw_regions(
        record["image"], boxes=[b["box"] for b in boxes], masks=own, texts=names, groups=names
    )


def _phantoms(model: bvl.Model, records: list[dict]) -> list[tuple]:
    names = [list(dict.fromkeys(b["name"] for b in r["boxes"])) for r in records]
    images = [r["image"] for r in records]
    found, masks = model.ground(images, names), model.segment(images, names)
    texts = model.describe(
        images, boxes=[[b["box"] for b in r["boxes"]] for r in records], length=FULL_LENGTH
    )
    out = []
    for record, own, one, mask, told in zip(records, names, found, masks, texts, strict=True):
        score = np.mean(
            [_best_iou(one.boxes[i], [b["box"] for b in record["boxes"] if b["name"] == n]) for i, n in enumerate(own)]
        )  # fmt: skip
        drawn = draw_regions(
            record["image"],
            boxes=one.boxes,
            masks=mask >= 0.5,
            texts=[n if f else f"{n} (not found)" for n, f in zip(own, one.found, strict=True)],
            notes=[f"{b['name']}: {t}" for b, t in zip(record["boxes"], told, strict=True)],
        )
        out.append((score, _truth(record, masks=True), drawn))
    return out


def _covid_cxr(model: bvl.Model, records: list[dict]) -> list[tuple]:
    phrases = ["right lung", "left lung"]
    out = []
    for record, one in zip(records, model.ground([r["image"] for r in records], phrases), strict=True):
        true = {b["name"]: b["box"] for b in record["boxes"]}
        ious = {n: _best_iou(box, [true[n]]) for box, n in zip(one.boxes, phrases, strict=True) if n in true}
        texts = [f"{n}, IoU {ious[n]:.2f}" if n in ious else n for n in phrases]
        drawn = draw_regions(record["image"], boxes=one.boxes, texts=texts)
        out.append((np.mean(list(ious.values())), _truth(record), drawn))
    return out


def _bccd(model: bvl.Model, records: list[dict]) -> list[tuple]:
    names = ["red blood cell", "white blood cell", "platelet"]
    out = []
    for record, one in zip(records, model.detect([r["image"] for r in records], names), strict=True):
        ious = pairwise_iou(one.boxes, np.array([b["box"] for b in record["boxes"]]))
        same = np.array([[n == b["name"] for b in record["boxes"]] for n in one.names]).reshape(ious.shape)
        hits = (np.where(same, ious, 0.0) >= 0.5).any(0).sum()
        score = 2 * hits / max(len(one.names) + len(record["boxes"]), 1)
        drawn = draw_regions(record["image"], boxes=one.boxes, texts=one.names, groups=one.names)
        out.append((score, _truth(record), drawn))
    return out


def _nuclei(model: bvl.Model, records: list[dict]) -> list[tuple]:
    out = []
    for record, mask in zip(records, model.segment([r["image"] for r in records], ["nucleus"]), strict=True):
        true, own = record["mask"] > 0, mask[0] >= 0.5
        score = dice(own, true)
        out.append(
            (
                score,
                draw_regions(record["image"], masks=[true], texts=["truth"]),
                draw_regions(record["image"], masks=[own], texts=[f"nucleus, Dice {score:.2f}"]),
            )
        )
    return out


def _best_iou(box: np.ndarray, true: list[list[float]]) -> float:
    return float(pairwise_iou(np.asarray(box)[None], np.asarray(true)).max())


_PREDICT = {"phantoms": _phantoms, "covid_cxr": _covid_cxr, "bccd": _bccd, "dsb2018_nuclei": _nuclei}
