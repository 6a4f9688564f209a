"""Average precision equals pycocotools on the same boxes and masks, and a resample equals repeated images.

`python tests/test_detection_metrics.py` writes the golden file anew where pycocotools is installed.
"""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.boxes import pairwise_iou
from bvl.metrics.detection import average_precision, match_detections
from bvl.metrics.masks import pairwise_mask_iou

PATH = Path(__file__).parent / "golden" / "pycocotools.json"
SIZE = 16
LIMITS = (2, 100)


def random_case(seed, kind, num_images=12):
    """Images of integer boxes with few different scores (many ties of score and of IoU); some images are empty."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        low = rng.integers(0, SIZE - 6, (n, 2))
        return np.concatenate([low, low + rng.integers(2, 7, (n, 2))], 1)

    images = []
    for i in range(num_images):
        true = boxes(0 if i % 5 == 1 else rng.integers(1, 5))
        moved = np.clip(true + rng.integers(-1, 2, true.shape), 0, SIZE)
        twins = np.repeat(np.concatenate([true, moved]), 1 + (i % 2), axis=0)
        found = np.concatenate([twins, boxes(2)])[: 0 if i % 5 == 2 else None]
        images.append(
            {
                "true": true.tolist(),
                "found": found.tolist(),
                "true_names": rng.choice(["red", "white"], len(true)).tolist(),
                # "never" has no true object, "missed" (below) no detection.
                "found_names": rng.choice(["red", "red", "white", "never"], len(found)).tolist(),
                "scores": (rng.integers(1, 6, len(found)) / 8).tolist(),
            }
        )
    images[0]["true_names"][0] = "missed"
    return {"kind": kind, "images": images}


def tied_case(kind):
    """The best detection fits two objects equally well; which one it takes decides about the other detection."""
    a, b, between = [0, 0, 8, 4], [2, 0, 10, 4], [1, 0, 9, 4]
    image = {
        "found": [between, a, b],
        "found_names": ["red", "red", "white"],
        "true_names": ["red", "red", "white"],
        "scores": [0.9, 0.8, 0.7],
    }
    return {"kind": kind, "images": [image | {"true": [a, b, b]}, image | {"true": [b, a, b]}]}


def masks_of(boxes):
    """Boxes without their lower right corner: masks whose IoUs differ from those of the boxes."""
    masks = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
        mask[y1 - 1, x1 - 1] = False
    return masks


def matched(case, **options):
    images = case["images"]

    def ious(image):
        if case["kind"] == "segm":
            return pairwise_mask_iou(masks_of(image["found"]), masks_of(image["true"]))
        return pairwise_iou(image["found"], image["true"])

    columns = ([image[key] for image in images] for key in ("scores", "found_names", "true_names"))
    return match_detections([ious(image) for image in images], *columns, **options)


def pycocotools_values(case, limit):
    """AP of each threshold and class that has objects, from pycocotools."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted({name for image in case["images"] for name in image["true_names"] + image["found_names"]})

    def entries(image, i, which):
        for box, mask, name in zip(
            image[which], masks_of(image[which]), image[f"{which}_names"], strict=True
        ):
            x0, y0, x1, y1 = (float(v) for v in box)
            entry = {"image_id": i, "category_id": names.index(name), "iscrowd": 0}
            if case["kind"] == "segm":
                entry["segmentation"] = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            else:
                entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            yield entry | {"area": float(mask.sum())}

    true, found = [], []
    for i, image in enumerate(case["images"]):
        true += [e | {"id": len(true) + k + 1} for k, e in enumerate(entries(image, i, "true"))]
        scored = zip(entries(image, i, "found"), image["scores"], strict=True)
        found += [e | {"score": score} for e, score in scored]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(case["images"]))],
            "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
            "annotations": true,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), case["kind"])
        evaluation.params.maxDets = [limit]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    present = [k for k in range(len(names)) if (precision[:, :, k] > -1).all()]
    return {names[k]: precision[:, :, k].mean(1).tolist() for k in present}


def assert_same(case, limit, expected):
    found = average_precision(matched(case, max_detections=limit))
    columns = {
        name: found.values[:, c] for c, name in enumerate(found.classes) if not np.isnan(found.values[0, c])
    }
    assert columns.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=0, atol=1e-9, err_msg=name)
    table = np.array(list(expected.values()))
    assert found.mean == pytest.approx(table.mean(), abs=1e-9)
    assert found.at(0.5) == pytest.approx(table[:, 0].mean(), abs=1e-9)
    assert found.per_class["white"] == pytest.approx(np.mean(expected["white"]), abs=1e-9)
    assert found.per_class_at(0.75)["red"] == pytest.approx(expected["red"][5], abs=1e-9)


@pytest.mark.parametrize("index", range(5))
def test_equals_golden_pycocotools(index):
    entry = json.loads(PATH.read_text(encoding="utf-8"))["cases"][index]
    assert_same(entry["case"], entry["max_detections"], entry["expected"])


@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed")
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("limit", LIMITS)
def test_equals_pycocotools(kind, limit):
    for case in [*(random_case(seed, kind) for seed in range(100, 115)), tied_case(kind)]:
        assert_same(case, limit, pycocotools_values(case, limit))


def test_classes_without_objects_are_absent():
    found = average_precision(matched(random_case(0, "bbox")))
    assert np.isnan(found.per_class["never"]) and found.per_class["missed"] == 0
    assert 0 < found.mean < 1
    nothing = average_precision(match_detections([], [], [], []))
    assert np.isnan(nothing.mean) and nothing.per_class == {}


def test_a_resample_equals_repeated_images():
    case, rng = random_case(3, "bbox"), np.random.default_rng(0)
    for image in case["images"]:  # no ties: among images of equal score the order is that of the sample
        image["scores"] = rng.random(len(image["scores"])).tolist()
    matches = matched(case)
    for _ in range(5):
        rows = rng.integers(len(case["images"]), size=len(case["images"]))
        repeated = {"kind": "bbox", "images": [case["images"][i] for i in rows]}
        expected = {
            k: v for k, v in average_precision(matched(repeated)).per_class.items() if not np.isnan(v)
        }
        values = average_precision(matches, rows).per_class
        assert {k: v for k, v in values.items() if not np.isnan(v)} == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    """Found, a miss, found: precision 1 up to recall 1/2, then 2/3."""
    matches = match_detections(
        [np.array([[0.8, 0.0], [0.1, 0.4]]), np.array([[0.6]])],
        [[0.9, 0.5], [0.3]],
        [["a", "a"], ["a"]],
        [["a", "b"], ["a"]],
        thresholds=[0.5],
    )
    found = average_precision(matches)
    assert found.per_class["a"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.per_class["b"] == 0
    with pytest.raises(DataError, match="0.75 was not matched"):
        found.at(0.75)


def test_wrong_arguments():
    with pytest.raises(DataError, match="image 0 has 1 detections and 2 objects"):
        match_detections([np.zeros((1, 1))], [[0.5]], [["a"]], [["a", "a"]])
    with pytest.raises(DataError, match="one entry of each an image"):
        match_detections([np.zeros((1, 1))], [], [["a"]], [["a"]])
    with pytest.raises(DataError, match="NaN"):
        match_detections([np.zeros((1, 1))], [[np.nan]], [["a"]], [["a"]])


def write_golden():
    cases = [random_case(seed, kind, 7) for seed, kind in enumerate(["bbox", "segm"])]
    entries = [
        {"case": case, "max_detections": limit, "expected": pycocotools_values(case, limit)}
        for case in cases
        for limit in LIMITS
    ]
    tied = tied_case("bbox")
    entries.append({"case": tied, "max_detections": 100, "expected": pycocotools_values(tied, 100)})
    about = "Random boxes (of segm: masks made of them) and AP per threshold and class by pycocotools 2.0.11."
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    PATH.write_text(f'{{\n"about": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    write_golden()
