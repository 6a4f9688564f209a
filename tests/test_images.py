import io
import warnings

import numpy as np
import pytest
from PIL import Image

from bvl.data.images import load_image, load_mask, open_image
from bvl.errors import ImageError

RNG = np.random.default_rng(0)
# Smooth, so that JPEG keeps it within a few grey levels; not symmetric, so that a wrong orientation shows.
RAMP = np.linspace(0, 255, 12 * 20).reshape(12, 20).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def encoded(picture, *, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def message_of(value, root=None, *, load=load_image, **options):
    with pytest.raises(ImageError) as caught:
        load(value, root, **options)
    return str(caught.value)


def test_the_same_picture_from_every_kind_of_value(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    values = [
        (tmp_path / "a.png", None),
        (str(tmp_path / "a.png"), "elsewhere"),
        ("a.png", tmp_path),
        (data, None),
    ]
    for value, root in [*values, (Image.fromarray(COLOUR), None), (COLOUR, None)]:
        image = load_image(value, root)
        assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous
        np.testing.assert_array_equal(image, COLOUR)


def test_jpeg_colour_and_grey():
    image = load_image(encoded(Image.fromarray(COLOUR), format="JPEG", quality=95, subsampling=0))
    assert image.shape == (12, 20, 3) and np.abs(image.astype(int) - COLOUR).mean() < 4
    data = encoded(Image.fromarray(RAMP), format="JPEG", quality=95)
    assert open_image(data).mode == "L"
    grey = load_image(data)
    assert grey.shape == (12, 20, 3) and (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0].astype(int) - RAMP).max() < 6


def test_sixteen_bits():
    deep = (RAMP.astype(np.uint16) * 257)[..., None].squeeze()
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(load_image(encoded(Image.fromarray(deep), format=format))[..., 0], RAMP)
    shallow = RAMP.astype(np.uint16)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(shallow)))[..., 0], RAMP)
    np.testing.assert_array_equal(load_image(np.repeat(deep[..., None], 3, -1))[..., 2], RAMP)
    # 256 is the first value that is read as a full-range one.
    assert load_image(np.array([[256, 65535]], np.uint16))[0, :, 0].tolist() == [1, 255]


def test_arrays():
    np.testing.assert_array_equal(load_image(RAMP)[..., 1], RAMP)
    np.testing.assert_array_equal(load_image(RAMP[..., None])[..., 1], RAMP)
    np.testing.assert_array_equal(load_image(RAMP / 255.0)[..., 0], RAMP)
    np.testing.assert_array_equal(load_image(COLOUR.astype(np.float32) / 255), COLOUR)
    np.testing.assert_array_equal(load_image(COLOUR[::-1, ::2]), COLOUR[::-1, ::2])
    assert load_image(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    source = RAMP.copy()
    load_image(source)[:] = 0
    np.testing.assert_array_equal(source, RAMP)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 3, 2), np.uint8), "shape (2, 3, 2)"),
        (np.zeros((4, 2, 3, 3), np.uint8), "shape (4, 2, 3, 3)"),
        (np.zeros((0, 3), np.uint8), "shape (0, 3)"),
        (np.full((2, 2), 200.0), "0..1"),
        (np.full((2, 2), np.nan), "0..1"),
        (np.full((2, 2), -1, np.int16), "rescale"),
        (np.full((2, 2), "x"), "type <U1"),
    ],
)
def test_arrays_that_are_no_image(array, expected):
    message = message_of(array, name="record 'a'")
    assert message.startswith("record 'a'") and expected in message, message


def test_transparency_is_on_white():
    alpha = np.full((2, 3, 4), 0, np.uint8)
    alpha[0] = (10, 20, 30, 255)
    alpha[1, 0] = (0, 0, 0, 128)
    for value in (alpha, encoded(Image.fromarray(alpha))):
        image = load_image(value)
        assert image[0, 0].tolist() == [10, 20, 30] and image[1, 2].tolist() == [255] * 3
        assert image[1, 0].tolist() == [127] * 3
    grey = load_image(encoded(Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")))
    assert grey[0].tolist() == [[9] * 3, [255] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    np.testing.assert_array_equal(load_image(encoded(palette)), [[[200, 0, 0], [0, 200, 0]]])
    data = encoded(palette, transparency=1)
    np.testing.assert_array_equal(load_image(data), [[[200, 0, 0], [255, 255, 255]]])


def test_cmyk_and_one_bit():
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    image = load_image(encoded(cmyk, format="TIFF"))
    assert np.abs(image.astype(int) - COLOUR).max() <= 2
    image = load_image(encoded(cmyk, format="JPEG", quality=95, subsampling=0))
    assert image.shape == COLOUR.shape and np.abs(image.astype(int) - COLOUR).mean() < 6
    bits = Image.fromarray(np.array([[True, False]]))
    assert bits.mode == "1" and load_image(encoded(bits))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    image = load_image(encoded(Image.fromarray(COLOUR), format=format, exif=exif, **options))
    assert image.shape == (20, 12, 3)
    assert np.abs(image.astype(int) - np.rot90(COLOUR, -1)).mean() < 4


def test_missing_image_names_the_nearest(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "scan_01.png")
    message = message_of("scan_01.jpg", tmp_path)
    assert str(tmp_path / "scan_01.jpg") in message and "Did you mean scan_01.png?" in message
    assert str(tmp_path / "no") in message_of("no/a.png", tmp_path)
    assert "cannot be read" in message_of(tmp_path)


@pytest.mark.parametrize("load", [load_image, load_mask])
@pytest.mark.parametrize(("format", "keep"), [("JPEG", 0.6), ("PNG", 0.6), ("PNG", 0.02)])
def test_truncated(tmp_path, load, format, keep):
    data = encoded(Image.fromarray(RNG.integers(0, 255, (64, 64), np.uint8)), format=format)
    data = data[: int(len(data) * keep)]
    (tmp_path / "a.img").write_bytes(data)
    message = message_of("a.img", tmp_path, load=load)
    assert str(tmp_path / "a.img") in message and "damaged or truncated" in message, message
    assert message_of(data, load=load, name="record 'a'").startswith("record 'a'")


def test_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.png").write_text("no picture")
    assert "0 bytes" in message_of("empty.png", tmp_path) and "0 bytes" in message_of(b"")
    assert "known format" in message_of("notes.png", tmp_path)
    assert "NoneType is no image" in message_of(None)


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animations_are_refused(format):
    frames = [Image.fromarray(np.roll(RAMP, k, axis=1)) for k in range(3)]
    data = encoded(frames[0], format=format, save_all=True, append_images=frames[1:])
    assert "animated image with 3 frames" in message_of(data)
    assert load_image(encoded(frames[0], format=format)).shape == (12, 20, 3)


def test_decompression_bomb(monkeypatch):
    data = encoded(Image.fromarray(RAMP))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert "too large" in message_of(data)


def test_masks_keep_their_ids(tmp_path):
    ids = np.arange(12 * 20).reshape(12, 20)
    small, large = ids.astype(np.uint8), (ids * 200).astype(np.uint16)
    palette = Image.fromarray(small, "P")
    palette.putpalette(RNG.integers(0, 255, 768).tolist())
    for picture, expected in (
        (Image.fromarray(small), small),
        (Image.fromarray(large), large),
        (palette, small),
    ):
        picture.save(tmp_path / "mask.png")
        mask = load_mask("mask.png", tmp_path)
        assert mask.dtype == np.int32
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(load_mask(picture), expected)
    np.testing.assert_array_equal(load_mask(ids), ids)
    assert load_mask(encoded(Image.fromarray(np.array([[True, False]])))).tolist() == [[1, 0]]
    np.testing.assert_array_equal(load_mask(np.repeat(small[..., None], 3, -1)), small)


@pytest.mark.parametrize(
    "value", [COLOUR, np.zeros((2, 2)), np.zeros(4, int), encoded(Image.fromarray(COLOUR))]
)
def test_colour_is_no_mask(value):
    assert "single-channel" in message_of(value, load=load_mask)


def test_negative_ids_are_refused():
    assert "negative id -1" in message_of(np.array([[0, -1]]), load=load_mask)
