"""Regions drawn on images: in their places, legible at any size, nothing beyond the picture or over another label."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bvl.data import paint
from bvl.data.drawing import draw_regions, side_by_side
from bvl.data.paint import COLOURS, INK, Line, font_of, paint_mask, wrap_lines
from bvl.errors import ImageError, UserError

GREY = 100


def grey(width, height):
    return Image.new("L", (width, height), GREY)


def painted(picture, colour):
    """(x0, y0, x1, y1) about all pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.fixture
def written(monkeypatch):
    """(corner, text, width, height) of every text that is drawn."""
    out = []
    draw = ImageDraw.ImageDraw.text

    def record(self, xy, text, *, font, **options):
        out.append((xy, text, font.getlength(text), font.size))
        draw(self, xy, text, font=font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return out


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (640, 480), (4000, 3000)])
def test_boxes_lie_where_they_are_on_images_of_any_size(size):
    picture = draw_regions(grey(*size), boxes=[[0.25, 0.25, 0.5, 0.75]])
    width, height = picture.size
    assert max(picture.size) >= 512 and width % size[0] == 0 and width * size[1] == height * size[0]
    assert painted(picture, COLOURS[0]) == (width // 4, height // 4, width // 2, height * 3 // 4)
    # The line is as thick on a large scan, seen as a whole, as on a small image.
    row = (np.asarray(picture)[height // 2, : width * 3 // 8] == COLOURS[0]).all(-1)
    assert row.sum() == max(1, round(2 * max(picture.size) / 512))
    assert tuple(np.asarray(picture)[height // 2, width * 3 // 8]) == (GREY,) * 3


def test_boxes_at_and_beyond_the_border_stay_visible():
    picture = draw_regions(
        grey(64, 64), boxes=[[0.9, 0.9, 1.2, 1.0], [1.0, 0.2, 1.0, 0.3], [0, 0, 0.01, 0.01]]
    )
    for colour in COLOURS[:3]:
        assert (np.asarray(picture) == colour).all(-1).any()


def test_masks_are_tinted_with_an_outline():
    mask = np.zeros((32, 64), bool)
    mask[8:24, 16:48] = True
    picture = np.asarray(
        draw_regions(grey(64, 32), masks=[mask, None, np.zeros_like(mask)], boxes=[None] * 3)
    )
    tint = np.rint(GREY * (1 - paint.MASK_OPACITY) + np.array(COLOURS[0]) * paint.MASK_OPACITY)
    np.testing.assert_array_equal(picture[128, 256], tint)
    # 64 pixels become 512: the mask's first column is 16 x 8, and the outline is two pixels wide and inside.
    for x, value in ((127, (GREY,) * 3), (128, COLOURS[0]), (129, COLOURS[0]), (130, tint)):
        np.testing.assert_array_equal(picture[128, x], value)


def test_the_outline_of_a_mask_runs_along_the_border_of_the_image():
    pixels = np.full((8, 8, 3), GREY, np.uint8)
    paint_mask(pixels, np.ones((8, 8), bool), INK, width=2)
    edge = (pixels == INK).all(-1)
    assert edge.sum() == 64 - 16 and not edge[2:6, 2:6].any()


def test_labels_stand_inside_the_picture_and_off_each_other(written):
    boxes = [[0, 0, 0.2, 0.2], [0.1, 0.1, 0.3, 0.3], [0.8, 0.85, 1, 1], [0.7, 0.75, 0.95, 0.98]]
    texts = ["small nodule", "a cyst", "large mass in the right lower lobe of the lung", "µm β ≥ 3"]
    picture = draw_regions(grey(64, 64), boxes=boxes, texts=texts, scores=[0.5, 0.25, 1, 0])
    assert picture.size == (512, 512)
    lines = " ".join(text for _, text, _, _ in written)
    assert (
        lines
        == "small nodule 0.50 a cyst 0.25 large mass in the right lower lobe of the lung 1.00 µm β ≥ 3 0.00"
    )
    rectangles = np.array([(x, y, x + w, y + h) for (x, y), _, w, h in written])
    assert (rectangles[:, :2] >= 0).all() and (rectangles[:, 2:] <= 512).all()
    for i, a in enumerate(rectangles):
        for b in rectangles[:i]:
            assert (np.minimum(a[2:], b[2:]) <= np.maximum(a[:2], b[:2])).any()


def test_letters_grow_with_the_image(written):
    for side in (64, 512, 4096):
        draw_regions(grey(side, side), boxes=[[0.2, 0.2, 0.8, 0.8]], texts=["nodule"])
    assert [size for *_, size in written] == [13, 13, 104]


def test_labels_that_do_not_fit_become_numbers_with_their_texts_below(written):
    boxes = [[i / 20, 0.5, i / 20 + 0.04, 0.6] for i in range(20)]
    texts = [f"a region with a long description {i}" for i in range(20)]
    picture = draw_regions(grey(64, 64), boxes=boxes, texts=texts)
    assert picture.size[0] == 512 and picture.size[1] > 512
    on, below = [w for w in written if w[0][1] < 512], [w for w in written if w[0][1] >= 512]
    assert [text for _, text, _, _ in on] == [str(i + 1) for i in range(20)]
    assert [text for _, text, _, _ in below] == [f"{i + 1}: {text}" for i, text in enumerate(texts)]


def test_many_regions_of_few_groups_have_a_legend(written):
    boxes = [[i / 50, 0.5, i / 50 + 0.02, 0.6] for i in range(50)]
    names = ["cell"] * 49 + ["nucleus"]
    picture = draw_regions(grey(64, 64), boxes=boxes, texts=names, groups=names, scores=[0.5] * 50)
    assert [text for _, text, _, _ in written] == ["cell x 49", "nucleus x 1"]
    used = {tuple(c) for c in np.asarray(picture).reshape(-1, 3)} & set(COLOURS)
    assert used == set(COLOURS[:2])


def test_points_and_mixed_regions(written):
    mask = np.zeros((64, 64), bool)
    mask[40:50, 40:50] = True
    picture = draw_regions(
        grey(64, 64),
        boxes=[[0.1, 0.1, 0.2, 0.2], None, None],
        points=[None, (0.5, 0.25), None],
        masks=[None, None, mask],
        texts=["one", "two", "three"],
    )
    assert tuple(np.asarray(picture)[128, 256]) == COLOURS[1]
    assert [text for _, text, _, _ in written] == ["one", "two", "three"]


def test_notes_stand_below_the_picture(written):
    notes = ["not found: " + ", ".join(f"phrase {i}" for i in range(30))]
    picture = draw_regions(grey(100, 50), notes=notes)
    assert picture.size[0] == 600 and picture.size[1] > 300
    assert len(written) > 1 and all(y >= 300 and x + width <= 600 for (x, y), _, width, _ in written)
    assert tuple(np.asarray(picture)[150, 300]) == (GREY,) * 3


def test_heat_maps_paint_what_is_high(written):
    heat = np.zeros((32, 32))
    heat[:8], heat[24:] = np.nan, 0.5
    picture = np.asarray(draw_regions(grey(32, 32), heat_map=heat))
    for row in (4, 16):
        assert tuple(picture[row * 16, 256]) == (GREY,) * 3
    red, _, blue = map(int, picture[28 * 16, 256])
    assert red > GREY + 50 and blue < GREY
    assert written[0][1] == "heat map: 0.00 (clear) to 0.50"
    draw_regions(grey(32, 32), heat_map=np.full((32, 32), np.nan))
    assert written[1][1] == "heat map: nothing to see"


def test_pictures_side_by_side():
    sheet = side_by_side([grey(512, 300).convert("RGB"), grey(512, 320).convert("RGB")])
    assert sheet.size == (512 + 8 + 512, 320)
    assert sheet.getpixel((100, 310)) == (255, 255, 255) and sheet.getpixel((600, 310)) == (GREY,) * 3


def test_lines_fit_the_width():
    font = font_of(13)
    text = "word " * 200 + "x" * 300
    lines = wrap_lines([Line(text), Line("short", swatch=INK), Line("x" * 100)], 120, font)
    assert len(lines) > paint.MAX_LINES + 2
    assert all(font.getlength(line.text) <= 120 for line in lines)
    assert lines[paint.MAX_LINES - 1].text.endswith("...") and lines[paint.MAX_LINES].text == "short"


def test_letters_of_captions_have_a_form():
    font = font_of(13)
    nothing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != nothing for letter in "µβ×é≥→Ж")


@pytest.mark.parametrize(
    "options, part",
    [
        ({"boxes": [[0, 0, 1, 1]], "texts": ["a", "b"]}, "boxes 1, texts 2"),
        ({"masks": [np.ones((8, 9), bool)]}, r"masks\[0\] has the shape \(8, 9\); its image is 8x8"),
        ({"heat_map": np.ones((4, 8))}, r"heat_map has the shape \(4, 8\)"),
    ],
)
def test_bad_input(options, part):
    with pytest.raises(UserError, match=part):
        draw_regions(grey(8, 8), **options)
    with pytest.raises(ImageError, match="no such image"):
        draw_regions("no_such_image.png", **options)
