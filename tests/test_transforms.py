import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bvl.data.geometry import AxisAlignedMap, box_area, clip_boxes, crop_map, flip_map, place_map
from bvl.data.integer_resize import resize_bicubic
from bvl.data.transforms import MINIMUM_VISIBLE, Augment, Preprocess, apply, boxes_to_original
from bvl.errors import ConfigError, DataError

MODES = ("shortest_crop", "squash", "pad")
fraction = st.floats(0.0, 1.0, allow_nan=False)


@st.composite
def boxes_in(draw, low=0.0, high=1.0, smallest=0.01):
    x0, y0 = (draw(st.floats(low, high - smallest)) for _ in range(2))
    x1, y1 = (draw(st.floats(start + smallest, high)) for start in (x0, y0))
    return np.array([[x0, y0, x1, y1]])


@st.composite
def maps(draw):
    """Crops (also beyond the border), placements and flips, one after the other."""
    crop = draw(boxes_in(-0.5, 1.5, 0.1))[0]
    place = draw(boxes_in(smallest=0.1))[0]
    flip = flip_map(horizontal=draw(st.booleans()), vertical=draw(st.booleans()))
    return crop_map(tuple(crop)).then(flip).then(place_map(tuple(place)))


# -- geometry ---------------------------------------------------------------------------------------------------------


@given(boxes_in(), maps())
def test_the_inverse_undoes_a_map(boxes, forward):
    np.testing.assert_allclose(forward.inverse().boxes(forward.boxes(boxes)), boxes, atol=1e-6)
    np.testing.assert_allclose(forward.boxes(forward.inverse().boxes(boxes)), boxes, atol=1e-6)


@given(boxes_in(), maps())
def test_boxes_move_with_their_corner_points(boxes, forward):
    corners = forward.points(boxes.reshape(-1, 2))
    expected = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
    np.testing.assert_allclose(forward.boxes(boxes)[0], expected, atol=1e-12)


@given(boxes_in(), maps(), maps())
def test_then_is_one_after_the_other(boxes, first, second):
    np.testing.assert_allclose(first.then(second).boxes(boxes), second.boxes(first.boxes(boxes)), atol=1e-9)


@given(boxes_in(), st.booleans(), st.booleans())
def test_flipping_twice_changes_nothing(boxes, horizontal, vertical):
    flip = flip_map(horizontal=horizontal, vertical=vertical)
    np.testing.assert_allclose(flip.boxes(flip.boxes(boxes)), boxes, atol=1e-12)
    assert flip.then(flip) == AxisAlignedMap()


def test_flips_by_hand():
    box = np.array([[0.1, 0.2, 0.3, 0.6]])
    np.testing.assert_allclose(flip_map(horizontal=True, vertical=False).boxes(box), [[0.7, 0.2, 0.9, 0.6]])
    np.testing.assert_allclose(flip_map(horizontal=False, vertical=True).boxes(box), [[0.1, 0.4, 0.3, 0.8]])


@given(boxes_in(smallest=0.05))
def test_a_crop_is_the_whole_of_itself(boxes):
    np.testing.assert_allclose(crop_map(tuple(boxes[0])).boxes(boxes), [[0, 0, 1, 1]], atol=1e-9)
    np.testing.assert_allclose(place_map(tuple(boxes[0])).boxes(np.array([[0, 0, 1, 1]])), boxes, atol=1e-12)


@given(boxes_in(-1.0, 2.0), boxes_in(), fraction)
def test_clipping(boxes, window, minimum):
    clipped, valid = clip_boxes(boxes, tuple(window[0]), minimum_visible=minimum)
    assert (clipped[:, :2] >= window[:, :2]).all() and (clipped[:, 2:] <= window[:, 2:]).all()
    share = box_area(clipped)[0] / box_area(boxes)[0]
    if abs(share - minimum) > 1e-6:
        assert valid[0] == (share > minimum)


def test_clipping_by_hand():
    boxes = np.array([[-0.5, 0, 0.5, 1], [-0.9, 0, 0.1, 1], [1.2, 0, 1.5, 1], [0, 0, 1, 1]])
    clipped, valid = clip_boxes(boxes, (0, 0, 1, 1), minimum_visible=0.25)
    assert valid.tolist() == [True, False, False, True]
    np.testing.assert_allclose(clipped[:2], [[0, 0, 0.5, 1], [0, 0, 0.1, 1]])
    assert clip_boxes(np.zeros((0, 4)), (0, 0, 1, 1), minimum_visible=0.25)[1].shape == (0,)


# -- preprocessing ----------------------------------------------------------------------------------------------------


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "target", "resized", "offset"),
    [
        ((384, 251), 224, (342, 224), (59, 0)),  # int(224 * 384 / 251) = int(342.69...)
        ((251, 384), 224, (224, 342), (0, 59)),
        ((225, 224), 224, (225, 224), (0, 0)),  # round(0.5) is 0 and round(1.5) is 2
        ((227, 224), 224, (227, 224), (2, 0)),
        ((64, 64), 32, (32, 32), (0, 0)),
        ((100, 50), (40, 60), (80, 40), (10, 0)),
        ((100, 50), (60, 40), (120, 60), (40, 0)),
        ((50, 100), (40, 60), (60, 120), (0, 40)),
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_shortest_crop_is_resize_then_centre_crop(size, target, resized, offset, interpolation):
    picture = Image.fromarray(noise(size[1], size[0]))
    preprocess = Preprocess(image_size=target, interpolation=interpolation)
    height, width = preprocess.height_width
    method = getattr(Image.Resampling, interpolation.upper())
    expected = np.asarray(picture.resize(resized, method))[offset[1] :, offset[0] :][:height, :width]
    result = apply(np.asarray(picture), preprocess=preprocess, boxes=np.array([[0, 0, 1, 1]]))
    np.testing.assert_array_equal(result.image, expected)
    np.testing.assert_allclose(result.image_box, [0, 0, 1, 1])
    left, top = -offset[0] / width, -offset[1] / height
    whole = [[left, top, left + resized[0] / width, top + resized[1] / height]]
    np.testing.assert_allclose(result.to_original.inverse().boxes([[0, 0, 1, 1]]), whole)


@pytest.mark.parametrize(
    ("options", "size", "resized", "offset"),
    [
        ({"image_size": 48, "crop_offset": "down"}, (51, 48), (51, 48), (1, 0)),
        ({"image_size": 48, "crop_offset": "nearest"}, (51, 48), (51, 48), (2, 0)),
        ({"image_size": 48, "crop_offset": "nearest"}, (49, 48), (49, 48), (0, 0)),
        ({"image_size": 40, "resize_to": 57}, (57, 114), (57, 114), (8, 37)),
        ({"image_size": (20, 40), "resize_to": 44, "crop_offset": "down"}, (99, 80), (54, 44), (7, 12)),
        ({"image_size": (40, 60), "long_side": "down"}, (80, 107), (60, 80), (0, 20)),
        ({"image_size": (40, 60), "long_side": "nearest"}, (80, 107), (60, 80), (0, 20)),
        ({"image_size": (40, 60), "long_side": "down"}, (88, 30), (117, 40), (28, 0)),
        ({"image_size": (41, 40), "long_side": "nearest"}, (80, 47), (70, 41), (15, 0)),
        ({"image_size": (41, 40), "long_side": "down"}, (80, 47), (69, 41), (14, 0)),
        ({"image_size": 40, "resize_to": (50, 60), "resize": "squash"}, (33, 99), (60, 50), (10, 5)),
    ],
)
@pytest.mark.parametrize("resampler", ["pillow", "torchvision"])
def test_what_is_cut_out_of_what(options, size, resized, offset, resampler):
    picture = Image.fromarray(noise(size[1], size[0]))
    preprocess = Preprocess(**options, resampler=resampler)
    height, width = preprocess.height_width
    if resampler == "torchvision":
        whole = resize_bicubic(np.asarray(picture), resized)
    else:
        whole = np.asarray(picture.resize(resized, Image.Resampling.BICUBIC))
    expected = whole[offset[1] :, offset[0] :][:height, :width]
    result = apply(picture, preprocess=preprocess, boxes=np.array([[0, 0, 1, 1]]))
    np.testing.assert_array_equal(result.image, expected)
    left, top = -offset[0] / width, -offset[1] / height
    whole = [[left, top, left + resized[0] / width, top + resized[1] / height]]
    np.testing.assert_allclose(result.to_original.inverse().boxes([[0, 0, 1, 1]]), whole)


@pytest.mark.parametrize(
    ("size", "target", "placed"),
    [
        ((100, 50), 40, (0, 10, 40, 30)),
        ((50, 100), 40, (10, 0, 30, 40)),
        ((100, 51), 40, (0, 10, 40, 30)),  # 20.4 rows are 20
        ((100, 53), 40, (0, 9, 40, 30)),  # 21.2 rows are 21: 9 above, 10 below
        ((1000, 1), 40, (0, 19, 40, 20)),
        ((10, 10), (20, 60), (20, 0, 40, 20)),
    ],
)
@pytest.mark.parametrize("channels", [0, 3])
def test_pad_keeps_the_aspect_ratio(size, target, placed, channels):
    picture = Image.fromarray(noise(size[1], size[0], channels))
    x0, y0, x1, y1 = placed
    result = apply(picture, preprocess=Preprocess(image_size=target, resize="pad", fill=7))
    inside = np.asarray(picture.convert("RGB").resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(result.image[y0:y1, x0:x1], inside)
    outside = np.ones(result.image.shape[:2], bool)
    outside[y0:y1, x0:x1] = False
    assert (result.image[outside] == 7).all()
    height, width = result.image.shape[:2]
    np.testing.assert_allclose(result.image_box, [x0 / width, y0 / height, x1 / width, y1 / height])


def test_squash_keeps_boxes():
    boxes = np.array([[0.1, 0.2, 0.3, 0.9]])
    result = apply(noise(30, 70), preprocess=Preprocess(image_size=16, resize="squash"), boxes=boxes)
    expected = Image.fromarray(noise(30, 70)).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(result.image, np.asarray(expected))
    np.testing.assert_allclose(result.boxes, boxes)


@pytest.mark.parametrize("resize", MODES)
def test_an_image_of_the_right_size_is_untouched(resize):
    image = noise(24, 24)
    np.testing.assert_array_equal(
        apply(image, preprocess=Preprocess(image_size=24, resize=resize)).image, image
    )


@pytest.mark.parametrize("augment", [None, Augment(crop_scale=(0.5, 1), brightness=0.3, contrast=0.3)])
@pytest.mark.parametrize("resize", MODES)
def test_grey_and_colour_pictures_give_the_same(resize, augment):
    grey = Image.fromarray(noise(40, 30, 0))
    preprocess = Preprocess(image_size=16, resize=resize)
    images = [
        apply(p, preprocess=preprocess, augment=augment, rng=np.random.default_rng(3)).image
        for p in (grey, grey.convert("RGB"), np.asarray(grey.convert("RGB")))
    ]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert images[0].shape == (16, 16, 3) and images[0].flags.writeable


# -- everything together ----------------------------------------------------------------------------------------------


@st.composite
def settings_of_apply(draw, *, crop=True):
    height, width = draw(st.integers(24, 64)), draw(st.integers(24, 64))
    resize = draw(st.sampled_from(MODES))
    larger = resize != "pad" and draw(st.booleans())
    preprocess = Preprocess(
        image_size=(height, width),
        resize=resize,
        resize_to=(height + draw(st.integers(0, 9)), width + draw(st.integers(0, 9))) if larger else None,
        long_side=draw(st.sampled_from(["down", "nearest"])),
        crop_offset=draw(st.sampled_from(["down", "nearest"])),
        resampler=draw(st.sampled_from(["pillow", "torchvision"])),
    )
    low = draw(st.floats(0.3, 1.0)) if crop else 1.0
    augment = Augment(crop_scale=(low, 1.0), flip_horizontal=True, flip_vertical=True, brightness=0.2)
    return {
        "preprocess": preprocess,
        "augment": augment,
        "rng": np.random.default_rng(draw(st.integers(0, 99))),
    }


@settings(max_examples=200, deadline=None)
@given(settings_of_apply(), st.integers(20, 90), st.integers(20, 90), boxes_in(smallest=0.3))
def test_image_mask_and_box_stay_together(options, height, width, box):
    # A rectangle on whole pixels: its mask, its box and its grey values show the same thing before and after.
    x0, y0 = np.floor(box[0, :2] * (width, height)).astype(int)
    x1, y1 = np.ceil(box[0, 2:] * (width, height)).astype(int)
    mask = np.zeros((height, width), np.int32)
    mask[y0:y1, x0:x1] = 300
    image = np.repeat((mask > 0)[..., None], 3, -1).astype(np.uint8) * 200
    boxes = np.array([[x0 / width, y0 / height, x1 / width, y1 / height]])
    result = apply(image, boxes=boxes, mask=mask, **options)
    size = result.image.shape[1::-1]
    assert size == options["preprocess"].height_width[::-1] and result.mask.shape == size[::-1]
    if not result.box_valid[0]:
        return
    # The centres of the mask's pixels are just the pixel centres inside the box.
    rows, columns = np.nonzero(result.mask)
    around = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(around - result.boxes[0] * (size * 2)).max() <= 0.5 + 1e-6
    # Grey values blur over the edge by the filter's reach, so only what lies well inside is compared.
    left, top, right, bottom = result.boxes[0] * (size * 2) + np.array([3, 3, -3, -3])
    inner = result.image[int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)]
    assert (inner > 100).all()
    agree = (result.image[..., 0] > 80) == (result.mask > 0)
    assert agree.mean() > 0.85


@settings(max_examples=150, deadline=None)
@given(settings_of_apply(), st.integers(20, 90), st.integers(20, 90), boxes_in())
def test_boxes_return_to_the_original(options, height, width, boxes):
    result = apply(noise(height, width), boxes=boxes, **options)
    unclipped = result.to_original.inverse().boxes(boxes)[0]
    x0, y0, x1, y1 = result.image_box
    inside = (unclipped >= (x0, y0, x0, y0)).all() and (unclipped <= (x1, y1, x1, y1)).all()
    assert (result.boxes[0] >= (x0, y0, x0, y0)).all() and (result.boxes[0] <= (x1, y1, x1, y1)).all()
    back = boxes_to_original(result.boxes, result)
    if inside:
        assert result.box_valid[0]
        np.testing.assert_allclose(back, boxes, atol=1e-6)
    elif result.box_valid[0]:
        # What was cut away is gone, what is left lies within the box.
        assert (back[0, :2] >= boxes[0, :2] - 1e-6).all() and (back[0, 2:] <= boxes[0, 2:] + 1e-6).all()
        assert box_area(back)[0] >= (MINIMUM_VISIBLE - 1e-6) * box_area(boxes)[0]


@settings(max_examples=100, deadline=None)
@given(settings_of_apply(crop=False), st.integers(20, 90), st.integers(20, 90))
def test_the_padding_holds_no_image_and_no_mask(options, height, width):
    mask = np.full((height, width), 5)
    image = np.full((height, width, 3), 255, np.uint8)
    result = apply(image, mask=mask, **options)
    x0, y0, x1, y1 = np.rint(result.image_box * (result.image.shape[1::-1] * 2)).astype(int)
    inside = np.zeros(result.mask.shape, bool)
    inside[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(result.mask, np.where(inside, 5, 0))
    assert (result.image[~inside] == 0).all() and (result.image[inside] > 150).all()


def test_the_same_generator_gives_the_same_example_and_another_does_not():
    augment = Augment(crop_scale=(0.3, 0.9), flip_horizontal=True, brightness=0.4, contrast=0.4)
    first, again, other = (
        apply(
            noise(40, 50),
            preprocess=Preprocess(image_size=16),
            augment=augment,
            rng=np.random.default_rng(seed),
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.image, again.image)
    assert first.to_original == again.to_original != other.to_original
    with pytest.raises(ValueError, match="rng"):
        apply(noise(8, 8), preprocess=Preprocess(image_size=8), augment=augment)


def flip_counts(augment, **options):
    image, preprocess = noise(8, 8), Preprocess(image_size=8)
    results = [
        apply(image, preprocess=preprocess, augment=augment, rng=np.random.default_rng(i), **options)
        for i in range(200)
    ]
    kinds = [tuple(s < 0 for s in result.to_original.scale) for result in results]
    for (horizontal, vertical), result in zip(kinds, results, strict=True):
        expected = image[:: -1 if vertical else 1, :: -1 if horizontal else 1]
        np.testing.assert_array_equal(result.image, expected)
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_flips_happen_half_of_the_time_and_only_where_permitted():
    both = flip_counts(Augment(flip_horizontal=True, flip_vertical=True))
    assert len(both) == 4 and min(both.values()) > 25
    assert set(flip_counts(Augment(flip_horizontal=True))) == {(False, False), (True, False)}
    assert set(flip_counts(Augment(flip_vertical=True))) == {(False, False), (False, True)}
    both = Augment(flip_horizontal=True, flip_vertical=True)
    assert set(flip_counts(both, allow_horizontal_flip=False)) == {(False, False), (False, True)}


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("size", [(120, 60), (60, 60), (60, 76)])
def test_random_crops_have_the_asked_area_and_ratio(resize, size):
    augment = Augment(crop_scale=(0.2, 0.4), crop_ratio=(0.8, 1.25))
    preprocess = Preprocess(image_size=(32, 48), resize=resize)
    areas, ratios, corners = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        result = apply(noise(size[1], size[0]), preprocess=preprocess, augment=augment, rng=rng)
        x0, y0, x1, y1 = result.to_original.boxes(result.image_box[None])[0]
        assert min(x0, y0) >= -1e-9 and max(x1, y1) <= 1 + 1e-9
        areas.append((x1 - x0) * (y1 - y0))
        ratios.append((x1 - x0) * size[0] / ((y1 - y0) * size[1]))
        corners.append((x0, y0))
    base = 48 / 32 if resize == "shortest_crop" else size[0] / size[1]
    relative = np.array(ratios) / base
    assert 0.2 - 1e-6 <= min(areas) < 0.23 and 0.37 < max(areas) <= 0.4 + 1e-6
    assert 0.8 - 1e-6 <= relative.min() < 0.84 and 1.19 < relative.max() <= 1.25 + 1e-6
    assert np.std(corners, axis=0).min() > 0.03


def test_a_crop_that_never_fits_is_the_largest_centred_one():
    # At most 1 / 6 of a 10:60 strip is a square; half of it never is.
    augment = Augment(crop_scale=(0.5, 0.5), crop_ratio=(1, 1))
    result = apply(
        noise(60, 10), preprocess=Preprocess(image_size=16), augment=augment, rng=np.random.default_rng(0)
    )
    np.testing.assert_allclose(result.to_original.boxes([[0, 0, 1, 1]]), [[0, 25 / 60, 1, 35 / 60]])


def test_brightness_and_contrast():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:5], image[5:] = 60, 100
    preprocess = Preprocess(image_size=10)

    def jittered(seed, **options):
        rng = np.random.default_rng(seed)
        result = apply(image, preprocess=preprocess, augment=Augment(**options), rng=rng).image
        return float(result[0, 0, 0]), float(result[9, 9, 0])

    bright = np.array([jittered(seed, brightness=0.5) for seed in range(100)])
    assert np.abs(bright[:, 1] / bright[:, 0] - 100 / 60).max() < 0.05
    assert 30 <= bright[:, 0].min() < 35 and 85 < bright[:, 0].max() <= 90
    contrasts = np.array([jittered(seed, contrast=0.5) for seed in range(100)])
    assert np.abs(contrasts.sum(axis=1) - 160).max() <= 1
    spread = contrasts[:, 1] - contrasts[:, 0]
    assert 20 <= spread.min() < 24 and 56 < spread.max() <= 60


def test_padding_keeps_its_fill_under_jitter():
    augment = Augment(brightness=0.5, contrast=0.5)
    preprocess = Preprocess(image_size=16, resize="pad", fill=90)
    result = apply(noise(8, 16), preprocess=preprocess, augment=augment, rng=np.random.default_rng(0))
    assert (result.image[:4] == 90).all() and (result.image[12:] == 90).all()


def erased(augment, seed, image, **preprocess):
    """(the covered pixels [H, W], the result)"""
    options = {
        "preprocess": Preprocess(image_size=image.shape[0], **preprocess),
        "boxes": np.array([[0, 0, 1, 1.0]]),
    }
    plain = apply(image, **options)
    result = apply(image, **options, augment=augment, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(result.boxes, plain.boxes)
    assert result.box_valid.all()
    return (result.image != plain.image).any(-1), result.image


def test_random_erasing():
    image = np.full((40, 40, 3), 7, np.uint8)
    augment = Augment(erase=0.7, erase_scale=(0.1, 0.3), erase_fill="mean")
    shares, places = [], []
    for seed in range(200):
        covered, result = erased(augment, seed, image, mean=(0.2, 0.4, 0.6))
        if covered.any():
            rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
            assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert (result[covered] == [51, 102, 153]).all()
            shares.append(covered.mean())
            places.append(rows.mean())
    # Whole pixels make a share somewhat smaller or larger than asked for.
    assert 0.08 < min(shares) < 0.13 and 0.27 < max(shares) < 0.33
    assert len(shares) / 200 == pytest.approx(0.7, abs=0.08)
    assert min(places) < 10 and max(places) > 30
    covered, result = erased(Augment(erase=1.0), 0, image)
    assert len(np.unique(result[covered])) > 30
    np.testing.assert_array_equal(result, erased(Augment(erase=1.0), 0, image)[1])
    assert not np.array_equal(result, erased(Augment(erase=1.0), 1, image)[1])


def test_erasing_leaves_the_padding():
    image = np.full((40, 10, 3), 200, np.uint8)
    for seed in range(20):
        covered, _ = erased(Augment(erase=1.0), seed, image, resize="pad", fill=3)
        assert not covered[:, :15].any() and not covered[:, 25:].any()
    # What cannot fit is not done.
    thin = np.full((40, 1, 3), 200, np.uint8)
    covered, _ = erased(Augment(erase=1.0, erase_scale=(1.0, 1.0)), 0, thin, resize="pad")
    assert not covered.any()


def test_a_mask_may_have_another_resolution_but_not_another_shape():
    image, preprocess = noise(40, 60), Preprocess(image_size=20, resize="squash")
    mask = np.zeros((20, 30), np.int32)
    mask[:, 15:] = 2
    np.testing.assert_array_equal(apply(image, preprocess=preprocess, mask=mask).mask[:, 10:], 2)
    with pytest.raises(DataError, match="20x30 pixels.*60x40"):
        apply(image, preprocess=preprocess, mask=mask.T)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [32, (32, 48)])
@pytest.mark.parametrize("options", [{"resize": "pad", "fill": 4}, {"resize_to": (60, 50)}])
def test_preprocess_survives_json(image_size, options):
    preprocess = Preprocess(image_size=image_size, mean=(0.1, 0.2, 0.3), **options)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (Preprocess, {"image_size": 0}, "image_size"),
        (Preprocess, {"image_size": (4, 4, 3)}, "image_size"),
        (Preprocess, {"image_size": 4, "resize": "crop"}, "shortest_crop, squash, pad"),
        (Preprocess, {"image_size": 4, "interpolation": "box"}, "bicubic, bilinear"),
        (Preprocess, {"image_size": 4, "mean": (0.5, 0.5)}, "mean"),
        (Preprocess, {"image_size": 4, "std": (0.5, 0, 0.5)}, "std"),
        (Preprocess, {"image_size": 4, "fill": 256}, "fill"),
        (Preprocess, {"image_size": 4, "resize_to": (8, 3)}, "resize_to.*smaller than image_size"),
        (Preprocess, {"image_size": 4, "resize_to": 0}, "resize_to"),
        (Preprocess, {"image_size": 4, "resize_to": 8, "resize": "pad"}, "resize_to.*pad"),
        (Preprocess, {"image_size": 4, "long_side": "up"}, "long_side.*down or nearest"),
        (Preprocess, {"image_size": 4, "crop_offset": "up"}, "crop_offset.*down or nearest"),
        (Preprocess, {"image_size": 4, "resampler": "both"}, "pillow or torchvision"),
        (Augment, {"crop_scale": (0, 1)}, "crop_scale"),
        (Augment, {"crop_scale": (0.5, 1.5)}, "crop_scale"),
        (Augment, {"crop_scale": 0.5}, "crop_scale"),
        (Augment, {"crop_ratio": (2, 1)}, "crop_ratio"),
        (Augment, {"brightness": -0.1}, "brightness"),
        (Augment, {"contrast": "x"}, "contrast"),
        (Augment, {"flip_horizontal": 1}, "flip_horizontal"),
        (Augment, {"erase": 1.5}, "erase"),
        (Augment, {"erase_scale": (0.5, 0.1)}, "erase_scale"),
        (Augment, {"erase_fill": "black"}, "noise or mean"),
    ],
)
def test_bad_options(kind, options, expected):
    with pytest.raises(ConfigError, match=expected):
        kind(**options)


def test_bad_preprocess_files():
    with pytest.raises(ConfigError, match="unknown key.*side.*image_size"):
        Preprocess.from_dict({"image_size": 4, "side": 3})
    with pytest.raises(ConfigError, match="image_size is missing"):
        Preprocess.from_dict({})
