"""Preprocessing of open_clip and transformers: read, written, and equal pixel for pixel."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from bvl.convert.peers import import_peer
from bvl.convert.preprocess import (
    as_written,
    differences,
    from_hf,
    from_open_clip,
    read_hf,
    to_hf,
    to_open_clip,
)
from bvl.data.images import open_image
from bvl.data.transforms import CLIP_MEAN, CLIP_STD, Preprocess, apply
from bvl.errors import ConversionError

# (width, height): odd, tiny, wide, tall, a resized side at half a pixel, and one that exceeds a crop by 3 pixels.
SIZES = [(53, 37), (37, 53), (64, 64), (5, 3), (300, 8), (8, 300), (640, 330), (51, 48), (48, 51), (111, 74)]


def pictures():
    """Noise, smooth ones with a sharp edge, grey ones, and opaque ones with an alpha channel."""
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        y, x = np.mgrid[0:height, 0:width]
        disk = 255 * (np.hypot(x - width / 2, y - height / 2) < min(height, width) / 3)
        smooth = np.stack(
            [127 + 120 * np.sin(x / (width / 7 + 1) + y / 9), 255 * x / max(1, width - 1), disk], axis=-1
        ).astype(np.uint8)
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        yield Image.fromarray(smooth)
        yield Image.fromarray(smooth[..., 0])
        yield Image.fromarray(np.dstack([smooth, np.full((height, width), 255, np.uint8)]))


def worst(transform, preprocess):
    """(largest difference in grey levels, share of values that differ by more than 1) over all pictures."""
    largest, beyond = 0.0, []
    mean, std = (np.asarray(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    for picture in pictures():
        ours = apply(open_image(picture), preprocess=preprocess).image.transpose(2, 0, 1)
        theirs = np.rint((np.asarray(transform(picture), np.float64) * std + mean) * 255)
        assert theirs.shape == ours.shape
        difference = np.abs(theirs - ours)
        largest = max(largest, difference.max())
        beyond.append((difference > 1).mean())
    return largest, float(np.mean(beyond))


def peer(name):
    pytest.importorskip("torch")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return import_peer(name, what="this test")


@pytest.fixture(scope="module")
def image_transform():
    return peer("open_clip").transform.image_transform


@pytest.mark.parametrize(
    "config, size",
    [
        ({}, 48),
        ({"interpolation": "bilinear", "mean": [0.5] * 3, "std": 0.25}, (48, 48)),
        ({"interpolation": "bilinear"}, (40, 64)),
        ({"resize_mode": "squash", "size": 99}, (40, 56)),
        ({"resize_mode": "longest", "fill_color": 9, "interpolation": "random"}, 48),
        ({"resize_mode": "longest", "fill_color": 200, "interpolation": "bilinear"}, (64, 40)),
    ],
)
def test_tensors_equal_those_of_open_clip(image_transform, config, size):
    preprocess = from_open_clip(config, size)
    options = {"mean": CLIP_MEAN, "std": CLIP_STD} | {k: v for k, v in config.items() if k != "size"}
    assert worst(image_transform(size, False, **options), preprocess) == (0, 0)
    # And so do those of what is written.
    written = to_open_clip(preprocess)
    del written["mode"]
    theirs = image_transform(written.pop("size"), False, **written)
    assert worst(theirs, preprocess) == (0, 0)
    assert from_open_clip(to_open_clip(preprocess), size) == preprocess
    assert differences(preprocess, "open_clip") == []


@pytest.fixture(scope="module")
def processors():
    return peer("transformers")


HF_CONFIGS = [
    ("CLIPImageProcessor", {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}),
    ("CLIPImageProcessor", {"size": 61, "crop_size": 48, "resample": 1}),
    (
        "BitImageProcessor",
        {"size": 57, "crop_size": {"height": 40, "width": 56}, "image_mean": [0.3, 0.4, 0.5]},
    ),
    ("SiglipImageProcessor", {"size": {"height": 40, "width": 56}}),
    ("ViTImageProcessor", {"size": 48, "do_convert_rgb": True}),
    ("BlipImageProcessor", {"size": 48}),
    ("ViTImageProcessor", {"size": 48, "do_normalize": False, "do_convert_rgb": True}),
    (
        "ViTImageProcessor",
        {"size": 48, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "do_convert_rgb": True},
    ),
    ("DeiTImageProcessor", {"size": {"height": 60, "width": 50}, "crop_size": 48, "do_convert_rgb": True}),
]


@pytest.mark.parametrize("name, options", HF_CONFIGS)
def test_tensors_equal_those_of_image_processors(processors, name, options, tmp_path):
    processor = getattr(processors, name)(**options)
    processor.save_pretrained(tmp_path)
    preprocess = from_hf(read_hf(tmp_path))
    # A file that says only what its author set means the same.
    assert from_hf({"image_processor_type": name, **options}) == preprocess

    def transform(picture):
        return processor(picture, return_tensors="np")["pixel_values"][0]

    largest, beyond = worst(transform, preprocess)
    # Bicubic is torchvision's to the bit; bilinear is computed in floats or integers there, as the processor's make is.
    assert largest <= (0 if preprocess.interpolation == "bicubic" else 1) and beyond == 0
    written = to_hf(preprocess, "CLIPImageProcessor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    again = processors.AutoImageProcessor.from_pretrained(tmp_path)
    for picture in list(pictures())[::5]:
        theirs = again(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(theirs, transform(picture), atol=1e-5)
    assert from_hf(written) == preprocess and differences(preprocess, "hf") == []


@pytest.mark.parametrize("name, options", HF_CONFIGS[:2])
def test_tensors_equal_those_of_the_pil_processors(processors, name, options):
    processor = getattr(processors, f"{name}Pil")(**options)
    preprocess = dataclasses.replace(from_hf({"image_processor_type": name, **options}), resampler="pillow")
    assert worst(lambda p: processor(p, return_tensors="np")["pixel_values"][0], preprocess) == (0, 0)


def test_what_is_rounded_otherwise_is_said_and_seen(processors, image_transform):
    """Each sentence of `differences` is about tensors that do differ."""
    ours = Preprocess(image_size=48)
    said = differences(ours, "hf")
    assert len(said) == 2 and "crop_offset='nearest'" in said[0] and "resampler='pillow'" in said[1]
    processor = processors.CLIPImageProcessor(**{k: v for k, v in to_hf(ours).items() if "type" not in k})
    assert worst(lambda p: processor(p, return_tensors="np")["pixel_values"][0], ours)[0] > 50
    written = as_written(ours, "hf")
    assert worst(lambda p: processor(p, return_tensors="np")["pixel_values"][0], written)[0] <= 2
    assert differences(written, "hf") == []
    oblong = Preprocess(image_size=(40, 64), crop_offset="down")
    said = differences(oblong, "open_clip")
    assert len(said) == 2 and "crop_offset='down'" in said[0] and "long_side='down'" in said[1]
    written = to_open_clip(oblong)
    options = {key: written[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    assert worst(image_transform((40, 64), False, **options), oblong)[0] > 50
    written = as_written(oblong, "open_clip")
    assert worst(image_transform((40, 64), False, **options), written) == (0, 0)


def test_defaults_of_open_clip():
    assert from_open_clip(None, (224, 224)) == Preprocess(image_size=224, mean=CLIP_MEAN, std=CLIP_STD)


def test_older_and_newer_files_of_transformers(tmp_path):
    assert read_hf(tmp_path) is None
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 48, "do_resize": True}
    expected = from_hf({"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}})
    assert from_hf(old) == expected and expected.mean == CLIP_MEAN
    assert expected.resize_to is None and expected.crop_offset == "down"
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "CLIPProcessor", "image_processor": old})
    )
    assert from_hf(read_hf(tmp_path)) == expected
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConversionError, match="no JSON"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "Pixtral.*known are CLIPImageProcessor"),
        ({"resample": 0}, r"resample=0 \(nearest\)"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"size": {"longest_edge": 48}}, "longest_edge.*known are shortest_edge"),
        ({"size": 40, "crop_size": 48}, "crop_size=48x48 is larger"),
        ({"do_pad": True}, "do_pad=True"),
        ({"image_mean": [0.5, 0.5]}, "mean is"),
        ({"rescale_factor": -1}, "rescale_factor=-1"),
        ({"rescale_factor": "x"}, "another kind: .*'x'"),
        ({"resample": [1]}, "another kind"),
        ({"size": {"shortest_edge": "x"}}, "another kind"),
    ],
)
def test_what_transformers_asks_for_in_vain(config, match):
    with pytest.raises(ConversionError, match=match):
        from_hf(config)


@pytest.mark.parametrize(
    "config, match",
    [
        ({"resize_mode": "tile"}, "resize_mode='tile'"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"mode": "L"}, "mode='L'"),
        ({"std": [0.5, 0.5, 0]}, "std is"),
        ({"mean": {"r": 1}, "resize_mode": []}, "another kind"),
    ],
)
def test_what_open_clip_asks_for_in_vain(config, match):
    with pytest.raises(ConversionError, match=match):
        from_open_clip(config, 32)


@pytest.mark.parametrize(
    "write, options, match",
    [
        (to_hf, {"resize": "pad"}, "preprocess.resize='pad'.*--to torch"),
        (to_hf, {"image_size": (32, 48)}, r"preprocess.image_size=\(32, 48\).*squash"),
        (to_hf, {"image_size": (32, 48), "long_side": "nearest"}, "long_side='nearest'"),
        (to_open_clip, {"resize_to": 40}, "preprocess.resize_to=40"),
        (to_open_clip, {"interpolation": "lanczos"}, "interpolation='lanczos'"),
        (to_open_clip, {"image_size": (32, 48), "interpolation": "bilinear"}, "interpolation='bilinear'"),
    ],
)
def test_what_cannot_be_written(write, options, match):
    with pytest.raises(ConversionError, match=match):
        write(Preprocess(**{"image_size": 32} | options))


def test_processors_that_do_not_crop():
    with pytest.raises(ConversionError, match="SiglipImageProcessor does not; use CLIPImageProcessor"):
        to_hf(Preprocess(image_size=32), "SiglipImageProcessor")
    with pytest.raises(ConversionError, match="known are"):
        to_hf(Preprocess(image_size=32), "OtherImageProcessor")
    squash = Preprocess(image_size=(32, 48), resize="squash")
    assert to_hf(squash, "ViTImageProcessor")["size"] == {"height": 32, "width": 48}
