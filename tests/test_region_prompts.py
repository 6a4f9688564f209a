"""Regions that a user points at: what is refused, and where the rest lies in the model's image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bvl.data.region_prompts import check_boxes, check_masks, check_points, prompts_of
from bvl.data.regions import KINDS, mask_cells
from bvl.data.transforms import Preprocess, apply
from bvl.errors import UserError

GRID = (8, 8)
SIDE = 32


def prompts(size=(60, 90), resize="shortest_crop", **regions):
    shown = apply(np.zeros((*size, 3), np.uint8), preprocess=Preprocess(image_size=SIDE, resize=resize))
    return prompts_of(shown, image_size=size, mask_size=GRID, **regions), shown


def blob(size, rows, columns):
    mask = np.zeros(size, bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize(
    "boxes, parts",
    [
        ([], ["scan 3: zero regions: give at least one box"]),
        ([[0, 0, 1, 1], [0.2, 0.2, 0.5]], ["scan 3, boxes[1]", "four numbers"]),
        ([[0, 0, 1, "1"]], ["boxes[0]", "four numbers"]),
        ([[0, 0, float("nan"), 1]], ["four numbers", "nan"]),
        ([[0.5, 0, 1.2, 1]], ["outside 0..1"]),
        ([[-0.1, 0, 1, 1]], ["outside 0..1"]),
        ([[10, 20, 200, 180]], ["outside 0..1", "pixels", "Divide x by the width"]),
        ([[0.6, 0, 0.2, 1]], ["reversed", "x0 < x1"]),
        ([[0.6, 0.1, 0.6, 1]], ["no area"]),
        ([0.1, 0.1, 0.4, 0.4], ["single box", "boxes=[box]"]),
        ("0,0,1,1", ["give a list"]),
        (3, ["give a list"]),
        ([None], ["boxes[0]", "four numbers"]),
    ],
)
def test_bad_boxes(boxes, parts):
    for check in (lambda: check_boxes(boxes, "scan 3"), lambda: prompts(boxes=boxes, where="scan 3")):
        with pytest.raises(UserError) as error:
            check()
        message = str(error.value)
        assert message.startswith("scan 3") and all(part in message for part in parts), message
        assert ("pixels" in message) == ("pixels" in parts)


@pytest.mark.parametrize(
    "points, parts",
    [
        ([], ["zero regions: give at least one point"]),
        ([[0.5, 0.5], [0.5]], ["points[1]", "two numbers"]),
        ([[0.5, float("inf")]], ["two numbers"]),
        ([[0.5, True]], ["two numbers"]),
        ([[0.5, 1.1]], ["points[0]", "outside 0..1"]),
        ([[120, 40]], ["pixels"]),
        ([0.5, 0.5], ["single point"]),
    ],
)
def test_bad_points(points, parts):
    with pytest.raises(UserError) as error:
        check_points(points, "scan 3")
    assert str(error.value).startswith("scan 3") and all(part in str(error.value) for part in parts), error


@pytest.mark.parametrize(
    "masks, parts",
    [
        ([], ["zero regions: give at least one mask"]),
        ([np.ones((4, 6), bool), np.zeros((4, 6), bool)], ["masks[1]", "empty"]),
        ([np.zeros((0, 0), bool)], ["masks[0]", "0x0 pixels"]),
        ([np.ones((6, 4), bool)], ["4x6 pixels", "its image 6x4", "image's size"]),
        ([np.ones((4, 6))], ["float64", "boolean"]),
        ([np.ones((4, 6, 3), np.uint8)], ["shape (4, 6, 3)"]),
        ([np.arange(24).reshape(4, 6)], ["several numbers", "ids == 3"]),
        (np.ones((4, 6), bool), ["masks is a single mask", "masks=[mask]"]),
        ([[1, 2]], ["masks is a single mask"]),
    ],
)
def test_bad_masks(masks, parts):
    with pytest.raises(UserError) as error:
        check_masks(masks, (4, 6), "scan 3")
    assert str(error.value).startswith("scan 3") and all(part in str(error.value) for part in parts), error


def test_good_regions():
    np.testing.assert_array_equal(check_boxes([(0, 0, 1, 0.5)]), [[0, 0, 1, 0.5]])
    assert check_boxes(np.array([[0, 0, 0.5, 1]], np.float32)).shape == (1, 4)
    np.testing.assert_array_equal(check_boxes([[-1e-7, 0, 1 + 1e-7, 1]]), [[0, 0, 1, 1]])
    np.testing.assert_array_equal(check_points([[np.float32(0.5), 1]]), [[0.5, 1]])
    for value in (True, 1, 255):
        masks = check_masks([np.where(np.eye(4), value, 0).astype(type(value))], (4, 4))
        assert masks.dtype == bool and (masks[0] == np.eye(4)).all()


@pytest.mark.parametrize(
    "regions, match",
    [
        ({}, "not none"),
        ({"boxes": [[0, 0, 1, 1]], "points": [[0.5, 0.5]]}, "not boxes and points"),
        ({"regions": []}, "zero regions: give at least one region"),
        ({"regions": [{"box": [0, 0, 1, 1], "point": [0, 0]}]}, r"regions\[0\].* is no region"),
        ({"regions": [{"circle": [0, 0, 1]}]}, "is no region"),
        ({"regions": [[0, 0, 1, 1]]}, "is no region"),
        ({"regions": {"box": [0, 0, 1, 1]}}, "give a list with one region"),
        ({"regions": [{"point": [0.5, 0.5]}, {"box": [2, 2, 9, 9]}]}, r"regions\[1\].*pixels"),
    ],
)
def test_bad_calls(regions, match):
    with pytest.raises(UserError, match=match):
        prompts(**regions)


def test_what_the_centre_crop_cuts_off():
    """Of a picture twice as wide as high the model sees the middle half."""
    size = (40, 80)
    seen = r"the part \[0.25, 0, 0.75, 1\] of the image"
    for regions, name in (
        ({"boxes": [[0.4, 0.4, 0.6, 0.6], [0, 0, 0.25, 1]]}, r"boxes\[1\]: the box"),
        ({"points": [[0.8, 0.5]]}, r"points\[0\]: the point"),
        ({"masks": [blob(size, slice(0, 40), slice(0, 20))]}, r"masks\[0\]: the mask"),
    ):
        with pytest.raises(UserError, match=f"{name} lies wholly in what is cut off.*{seen}"):
            prompts(size, **regions)
    out, _ = prompts(size, boxes=[[0, 0, 0.5, 1]])
    np.testing.assert_allclose(out["region_box"], [[0, 0, 0.5, 1]], atol=1e-6)
    out, _ = prompts(size, "pad", boxes=[[0, 0, 1, 1]])
    np.testing.assert_allclose(out["region_box"], [[0, 0.25, 1, 0.75]], atol=1e-6)


def test_kinds_mixed_as_each_alone():
    size = (60, 90)
    mask = blob(size, slice(20, 40), slice(30, 60))
    regions = [{"point": [0.5, 0.5]}, {"mask": mask}, {"box": [0.3, 0.3, 0.6, 0.7]}]
    mixed, _ = prompts(size, regions=regions)
    assert [KINDS[k] for k in mixed["region_kind"]] == ["point", "mask", "box"]
    alone = [
        prompts(size, points=[[0.5, 0.5]])[0],
        prompts(size, masks=mask[None])[0],
        prompts(size, boxes=np.array([[0.3, 0.3, 0.6, 0.7]]))[0],
    ]
    for key, value in mixed.items():
        np.testing.assert_array_equal(value, np.concatenate([one[key] for one in alone]), err_msg=key)
    assert {key: (v.dtype, v.shape) for key, v in mixed.items()} == {
        "region_box": (np.float32, (3, 4)),
        "region_point": (np.float32, (3, 2)),
        "region_mask": (np.bool_, (3, 8, 8)),
        "region_kind": (np.int8, (3,)),
    }


def test_a_speck_is_not_lost():
    size = (300, 300)
    out, _ = prompts(size, masks=[blob(size, 152, 299), blob(size, 0, 0)])
    assert out["region_mask"].sum((1, 2)).tolist() == [1, 1]
    assert out["region_mask"][0, 4, 7] and out["region_mask"][1, 0, 0]


fraction = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    resize=st.sampled_from(["shortest_crop", "squash", "pad"]),
    corner=st.tuples(fraction, fraction),
    extent=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
)
def test_prompts_lie_where_training_puts_them(size, resize, corner, extent):
    """Boxes and masks as `apply` carries those of a record; a point at the box's middle lies at its middle."""
    height, width = size
    x0, y0 = (c * (1 - e) for c, e in zip(corner, extent, strict=True))
    box = np.array([x0, y0, x0 + extent[0], y0 + extent[1]]).clip(0, 1)
    columns = slice(int(box[0] * width), int(np.ceil(box[2] * width)))
    rows = slice(int(box[1] * height), int(np.ceil(box[3] * height)))
    mask = blob(size, rows, columns)
    preprocess = Preprocess(image_size=SIDE, resize=resize)
    image = np.zeros((*size, 3), np.uint8)
    trained = apply(image, preprocess=preprocess, boxes=box[None], mask=mask.astype(np.int32))
    middle = trained.to_original.inverse().points([(box[:2] + box[2:]) / 2])[0]
    for name, value in (("boxes", box), ("points", (box[:2] + box[2:]) / 2), ("masks", mask)):
        try:
            out, _ = prompts(size, resize, **{name: [value]})
        except UserError as error:
            assert resize == "shortest_crop" and "cut off" in str(error)
            low, high = trained.image_box[:2], trained.image_box[2:]
            assert name == "points" or (middle < low).any() or (middle > high).any()
            continue
        if name == "boxes":
            np.testing.assert_allclose(out["region_box"], trained.boxes, atol=1e-6)
        elif name == "points":
            np.testing.assert_allclose(out["region_point"][0], middle, atol=1e-6)
        elif trained.mask.any():
            np.testing.assert_array_equal(out["region_mask"][0], mask_cells(trained.mask > 0, GRID))
