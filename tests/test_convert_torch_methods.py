"""Every method of the exported PyTorch class gives what that of bvl.Model gives, for the same arguments."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_regions import region_model
from tiny_run import fast_compilation  # noqa: F401

from bvl.api import Model
from bvl.assembly import build_model, parameter_shapes
from bvl.convert.parity import Difference
from bvl.convert.table import nested_params
from bvl.convert.torch_format import compare_torch, export_torch
from bvl.convert.torch_format.compare import load_torch_file, probe_images
from bvl.data.images import open_image
from bvl.data.phrases import encode_phrases, read_mark
from bvl.data.region_prompts import prompts_of
from bvl.data.resample import to_original_pixels
from bvl.data.sentences import split_sentences
from bvl.data.transforms import Preprocess, apply, boxes_to_original
from bvl.decode.guidance import guided_merge
from bvl.decode.options import DecodeOptions
from bvl.decode.search import search
from bvl.models.decoder import DecoderConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import Encoder
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")
FEW = {"batch_size": 4}


@pytest.fixture(scope="module")
def ours():
    torch.set_num_threads(1)
    return region_model()


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(ours, folder)
    return folder


@pytest.fixture(scope="module")
def module(folder):
    return load_torch_file(folder)


@pytest.fixture(scope="module")
def theirs(module, folder):
    return module.load(folder)


def export(model, folder, **changes):
    components = model.components
    export_torch(
        folder,
        config=components.config,
        params=components.params,
        tokenizer=components.tokenizer,
        **changes,
    )


def test_all_methods(ours, folder):
    compared = compare_torch(ours, folder)
    names = {name.partition("/")[0] for name, _, _ in compared}
    assert names == {
        *("embed_images", "embed_texts", "classify", "heat_maps", "caption", "describe"),
        *("ground", "segment", "detect"),
    }
    for name, absolute, relative in compared:
        assert absolute <= 2e-5 and relative <= 1e-4, name


def test_the_comparison_can_fail(ours, tmp_path):
    params = jax.tree.map(np.array, ours.params)
    params["model"]["text_projection"]["kernel"][0, 0] += 0.1
    params["model"]["decoder"]["norm"]["scale"][:] *= -1
    broken = Model(dataclasses.replace(ours.components, params=params))
    export(broken, tmp_path)
    wrong = {name for name, _, relative in compare_torch(ours, tmp_path) if relative > 1e-3}
    assert "embed_texts" in wrong and any(name.startswith("caption/") for name in wrong)
    assert "embed_images" not in wrong


def test_a_language_model_is_compared_too(ours, tmp_path):
    """No method of it writes, and yet its export is proven."""
    base = ours.components
    decoder = DecoderConfig("prefix", width=8, depth=1, num_heads=2, tied_head=False)
    config = dataclasses.replace(
        base.config, model=DualEncoderConfig(image=None, text=None, decoder=decoder), tasks={}
    )
    built = build_model(config, base.tokenizer)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(built)
    params = nested_params({n: rng.normal(0, 0.3, x).astype(np.float32) for n, x in shapes.items()})
    model = Model(dataclasses.replace(base, model=built, params=params, config=config))
    export(model, tmp_path)
    [(name, _, relative)] = compare_torch(model, tmp_path)
    assert name == "next tokens" and relative <= 1e-4
    params["model"]["decoder"]["head"] += 0.1
    [(_, _, relative)] = compare_torch(model, tmp_path)
    assert relative > 1e-3


def test_controls_and_constraints(ours, theirs):
    how = dict(
        guidance=[2.0, 1.0, 0.5],
        guidance_null="both",
        section=["caption", "impression", None],
        length=4,
        quality=1,
        prompt="ct",
        begin=["no", "", "a mass"],
        no_repeat_ngram=2,
        repetition_penalty=1.3,
        min_length=3,
        max_length=7,
        **FEW,
    )
    expected = ours.caption(probe_images(), **how)
    assert len(set(expected)) == 3 and all(expected)
    assert theirs.caption(probe_images(), **how) == expected


def test_regions_of_all_kinds(ours, theirs):
    images = probe_images()
    mask = np.zeros(images[1].shape[:2], bool)
    mask[10:60, 5:40] = True
    regions = [[{"box": [0, 0.1, 0.5, 0.9]}, {"point": [0.7, 0.2]}], [{"mask": mask}], []]
    how = dict(
        regions=regions, length=[[3, 8], [2], []], guidance=[[1.0, 2.0], [3.0], []], guidance_null="region"
    )
    assert theirs.describe(images, **how, **FEW) == ours.describe(images, **how, **FEW)


def test_masks_as_channels_and_phrases_read_by_the_decoder(ours, tmp_path):
    """The other ways to tell of regions and to read phrases, on padded images that are not square."""
    base = ours.components
    model = dataclasses.replace(
        base.config.model,
        image=dataclasses.replace(base.config.model.image, mask_channel=True, stem="conv"),
        region_encoder=dataclasses.replace(base.config.model.region_encoder, kind="mask_channel"),
        region_decoder=dataclasses.replace(
            base.config.model.region_decoder, phrases="decoder", instance_masks=True
        ),
    )
    config = dataclasses.replace(
        base.config,
        model=model,
        data=dataclasses.replace(
            base.config.data, preprocess=Preprocess(image_size=(24, 40), resize="pad", fill=99)
        ),
        tasks={
            **base.config.tasks,
            "region_caption": RegionCaption(mask_channel=True),
            "grounding": Grounding(phrases="decoder"),
        },
    )
    built = build_model(config, base.tokenizer)
    rng = np.random.default_rng(5)
    params = {name: rng.normal(0, 0.3, shape) for name, shape in parameter_shapes(built).items()}
    params = nested_params({name: x.astype(np.float32) for name, x in params.items()})
    encoder = Encoder(built, config.data.preprocess, base.encoder.mesh)
    components = dataclasses.replace(
        base, model=built, params=params, config=config, encoder=encoder, preprocess=config.data.preprocess
    )
    other = Model(components)
    export(other, tmp_path)
    peer, images = load_torch_file(tmp_path).load(tmp_path), probe_images()
    boxes = [[[0.1, 0.2, 0.7, 0.9]], [], [[0, 0, 1, 1], [0.5, 0.5, 0.6, 0.6]]]
    how = dict(boxes=boxes, guidance=2.0, max_length=5, **FEW)
    assert peer.describe(images, **how) == other.describe(images, **how)
    phrases = [["a *nodule* here", "cyst"], ["left lung"], ["x"]]
    for a, b in zip(peer.ground(images, phrases), other.ground(images, phrases, **FEW), strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=2e-5)
        np.testing.assert_allclose(a.scores, b.scores, atol=2e-5)
    how = dict(threshold=0.0, max_detections=3, **FEW)
    for a, b in zip(peer.detect(images, ["x"], **how), other.detect(images, ["x"], **how), strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=2e-5)
        np.testing.assert_allclose(a.masks, b.masks, atol=2e-5)


def test_language_model_and_best_of(ours, theirs):
    images = probe_images()
    how = dict(guidance=2.0, beams=4, groups=2, best_of=3, max_length=5, **FEW)
    expected = ours.caption(images, language_model=ours, **how)
    assert theirs.caption(images, language_model=theirs, **how) == expected


def test_samples_depend_on_seed_and_number_alone(theirs):
    images = [probe_images()[0]] * 4
    how = dict(temperature=1.5, top_k=20, top_p=0.9, max_length=6)
    first = theirs.caption(images, seed=1, **how)
    assert theirs.caption(images, seed=1, batch_size=3, **how) == first
    assert theirs.caption(images[:1], seed=1, first_row=2, **how) == first[2:3]
    assert len(set(first)) > 1 and theirs.caption(images, seed=2, **how) != first


def test_classes_and_heat_maps(ours, theirs):
    images = probe_images()
    pairs = {
        "a": {"positive": ["a nodule", "a mass"], "negative": "no"},
        "b": {"positive": "x", "negative": "y"},
    }
    for prompts, multi_label in ((pairs, True), ({"a": "a", "b": ["b", "c"]}, False), (["a"], True)):
        expected = ours.classify(images, prompts, multi_label, **FEW)
        np.testing.assert_allclose(theirs.classify(images, prompts, multi_label), expected, atol=1e-5)
    how = dict(against=["no nodule"], sigma=1.2, **FEW)
    for a, b in zip(
        theirs.heat_maps(images, ["a nodule"], **how),
        ours.heat_maps(images, ["a nodule"], **how),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_detections_one_by_one(ours, theirs):
    how = dict(threshold=0.2, iou_threshold=0.6, max_detections=5, **FEW)
    for a, b in zip(
        theirs.detect(probe_images(), ["a nodule", "*cyst*", "cyst"], **how),
        ours.detect(probe_images(), ["a nodule", "*cyst*", "cyst"], **how),
        strict=True,
    ):
        assert a.names == b.names and a.masks is None
        np.testing.assert_allclose(a.boxes, b.boxes, atol=2e-5)
        np.testing.assert_allclose(a.scores, b.scores, atol=2e-5)


def test_calibration_belongs_to_its_weights(ours, module, tmp_path, caplog):
    images, phrases = probe_images(), ["a nodule", "a cyst"]
    scores = np.concatenate([found.scores for found in ours.ground(images, phrases, **FEW)])
    logits = np.log(scores / (1 - scores))
    calibration = {
        "negatives": sorted((np.tile(logits, 4) + np.repeat([-0.5, -0.1, 0.1, 0.4], 6)).tolist()),
        "weights_hash": ours.components.weights_hash(),
    }
    calibrated = Model(dataclasses.replace(ours.components, calibration=calibration))
    export(ours, tmp_path, calibration=calibration)
    model = module.load(tmp_path)
    for alpha in (0.1, 0.4, 0.01):
        for a, b in zip(
            model.ground(images, phrases, alpha=alpha),
            calibrated.ground(images, phrases, alpha=alpha, **FEW),
            strict=True,
        ):
            np.testing.assert_allclose(a.p_values, b.p_values)
            np.testing.assert_array_equal(a.found, b.found)
    with torch.no_grad():
        model.log_scale += 0.1
    model.save(tmp_path)
    assert np.isnan(module.load(tmp_path).ground(images, phrases)[0].p_values).all()
    assert "other weights" in caplog.text
    # That of a run's last step is not handed on with an earlier one.
    stale = Model(dataclasses.replace(ours.components, calibration=calibration | {"weights_hash": "another"}))
    report = stale.export(tmp_path / "stale", "torch", check=False)
    found = [
        Difference("method", "", name, "", 1e-6, 2e-6, True) for name in ("embed_texts", "caption/greedy")
    ]
    report = dataclasses.replace(report, differences=found)
    assert report.largest() == {"embed_texts": 1e-6, "caption/greedy": 2e-6}
    assert not (tmp_path / "stale" / "calibration.json").exists()


PREPROCESS = {
    "crop": dict(image_size=(24, 40), interpolation="bilinear"),
    "open_clip": dict(image_size=(40, 24), long_side="nearest", crop_offset="down"),
    "larger first": dict(image_size=32, resize_to=37, resampler="torchvision"),
    "squash": dict(image_size=(24, 40), resize="squash", interpolation="lanczos"),
    "squash and cut": dict(image_size=24, resize="squash", resize_to=(30, 26)),
    "pad": dict(image_size=(33, 40), resize="pad", fill=77),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_preprocessing(module, tmp_path, name):
    preprocess = Preprocess(**PREPROCESS[name])
    (tmp_path / "preprocess.json").write_text(json.dumps(preprocess.to_dict()))
    peer = module.Preprocess.load(tmp_path / "preprocess.json")
    maps = np.random.default_rng(0).normal(size=(2, 5, 7))
    boxes = np.array([[0.1, 0.2, 0.7, 0.9]])
    for image in probe_images():
        a, b = peer(image), apply(open_image(image), preprocess=preprocess)
        np.testing.assert_array_equal(a.pixels, b.image)
        np.testing.assert_allclose(a.window, b.image_box)
        np.testing.assert_allclose(a.boxes_to_original(boxes), boxes_to_original(boxes, b))
        size = image.shape[:2]
        np.testing.assert_allclose(
            a.to_original_pixels(maps, outside=-1.0), to_original_pixels(maps, b, size, outside=-1.0)
        )
        mask = np.zeros(size, bool)
        mask[size[0] // 3 : size[0] // 2, size[1] // 3 :] = True
        dot = np.zeros(size, bool)
        dot[size[0] // 2, size[1] // 2] = True
        regions = [{"box": [0.3, 0.3, 0.8, 0.6]}, {"point": [0.5, 0.45]}, {"mask": mask}, {"mask": dot}]
        grid = tuple(side // (8 if side % 8 == 0 else side) for side in b.image.shape[:2])
        expected = prompts_of(b, image_size=size, mask_size=grid, regions=regions)
        for k, region in enumerate(regions):
            prompt = module.region_prompt(region, a, grid, "here")
            for field in ("box", "point", "mask", "kind"):
                found = getattr(prompt, field)[0].numpy()
                np.testing.assert_allclose(found, expected[f"region_{field}"][k], atol=1e-6)


def test_pictures_of_all_kinds(module, tmp_path):
    rng = np.random.default_rng(0)
    colour, deep = rng.integers(0, 256, (9, 7, 3), np.uint8), rng.integers(0, 60000, (9, 7), np.uint16)
    alpha = np.dstack([colour, rng.integers(0, 256, (9, 7), np.uint8)])
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour).save(turned, "JPEG", exif=exif, quality=95)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(colour).quantize(16).save(tmp_path / "palette.png")
    pictures = [
        *(colour, deep, alpha, colour[..., 0], colour[..., :1], colour[..., 0] > 99, deep / 65535.0),
        *(tmp_path / "deep.png", str(tmp_path / "palette.png"), turned.getvalue()),
        *(Image.fromarray(alpha), Image.fromarray(colour).convert("CMYK"), Image.fromarray(colour[..., 0])),
    ]
    for picture in pictures:
        a, b = module.open_image(picture), open_image(picture)
        assert a.mode == b.mode
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    (tmp_path / "no.png").write_bytes(b"no picture")
    for wrong in (
        tmp_path / "no.png",
        tmp_path / "missing.png",
        3,
        colour.astype(float),
        np.zeros((2, 2, 5)),
    ):
        with pytest.raises(module.UserError):
            module.open_image(wrong)


def test_texts(ours, theirs, module):
    tokenizer = ours.components.tokenizer
    texts = [
        "A nodule in the left lung.",
        "X-ray (frontal): no finding. Dr. Smith saw 2.5 cm at no. 5; unchanged! IMPRESSION: 1. Clear.",
        "",
        "hepatitis B. by J. Doe\n\n- one\n- two",
        "word " * 40,
    ]
    for text in texts:
        ids, mask, _ = tokenizer.encode(text)
        found = theirs.tokenizer.encode(text)
        np.testing.assert_array_equal(found[0], ids)
        np.testing.assert_array_equal(found[1], mask)
        assert theirs.tokenizer.decode(ids) == tokenizer.decode(ids)
        assert module.split_sentences(text) == split_sentences(text)
    long = [texts[1] * 2, texts[4]]
    np.testing.assert_allclose(
        theirs.embed_texts(long, long="chunks"),
        ours.embed_texts(long, long="chunks", batch_size=4),
        atol=2e-5,
    )
    marked = ["a *nodule* here", "a nodule", "2*3*4 *x", "*two* *marks*"]
    assert [module.read_mark(text) for text in marked] == [read_mark(text) for text in marked]
    for a, b in zip(
        module.encode_phrases(theirs.tokenizer, marked), encode_phrases(tokenizer, marked), strict=True
    ):
        np.testing.assert_array_equal(a, b)


class Toy:
    """Logits that depend on the last token, on the row and on all tokens so far, for both libraries."""

    def __init__(self, rows, size=11):
        rng = np.random.default_rng(3)
        self.table = rng.normal(0, 2, (rows, size, size)).astype(np.float32)

    def step(self, cache, tokens, t):
        cache = cache + jnp.sin(tokens * 1.7 + t)[..., None]
        rows = jnp.arange(len(tokens))[:, None]
        return jnp.asarray(self.table)[rows, tokens] + jnp.sin(cache * jnp.arange(1, 12)), cache

    def first(self):
        return self.table[:, 0]


@dataclasses.dataclass
class ToyState:
    cache: "torch.Tensor"
    row: "torch.Tensor"
    t: int

    def spread(self, k):
        return ToyState(self.cache.repeat_interleave(k, 0), self.row.repeat_interleave(k), self.t)

    def reorder(self, rows):
        return ToyState(self.cache[rows], self.row, self.t)


@dataclasses.dataclass
class ToyDecoder:
    table: "torch.Tensor"

    def step(self, state, tokens):
        cache = state.cache + torch.sin(tokens * 1.7 + state.t)[:, None]
        logits = self.table[state.row, tokens] + torch.sin(cache * torch.arange(1, 12))
        return logits, ToyState(cache, state.row, state.t + 1)


SEARCHES = [
    dict(beams=1, no_repeat_ngram=2, min_length=4),
    dict(beams=4, num_return=3, length_penalty=0.0),
    dict(beams=3, num_return=3, length_penalty=-1.0, no_repeat_ngram=1, exact_stop=False),
    dict(beams=6, groups=3, num_return=6, diversity=1.5, repetition_penalty=1.4, length_penalty=2.0),
]


@pytest.mark.parametrize("how", SEARCHES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_search(module, how, guided):
    rows, toy = 2, Toy(4 if guided else 2)
    scale, forbidden = np.array([2.0, 0.5], np.float32), np.arange(11) == 7
    forced, forced_mask = np.array([[4, 5], [6, 6]]), np.array([[True, False], [False, False]])
    expected = search(
        jnp.asarray(toy.first()),
        jnp.zeros((len(toy.table), 1, 1)),
        toy.step,
        options=DecodeOptions(max_length=7, **how),
        end_id=2,
        pad_id=0,
        merge=guided_merge(jnp.asarray(scale)) if guided else None,
        forbidden=jnp.asarray(forbidden),
        forced=jnp.asarray(forced),
        forced_mask=jnp.asarray(forced_mask),
    )
    state = ToyState(torch.zeros(len(toy.table), 1), torch.arange(len(toy.table)), 0)
    texts = module.Continuations(
        [(ToyDecoder(torch.from_numpy(toy.table)), torch.from_numpy(toy.first()), state)]
    )
    rules = module.Rules(
        options=module.SearchOptions(max_length=7, **how),
        end_id=2,
        pad_id=0,
        scale=torch.from_numpy(scale) if guided else None,
        forbidden=torch.from_numpy(forbidden),
        forced=torch.from_numpy(forced),
        forced_mask=torch.from_numpy(forced_mask),
    )
    found = module.search(texts, rules, None)
    assert len(expected.tokens) == rows
    kept = np.isfinite(np.asarray(expected.scores))
    np.testing.assert_array_equal(found.tokens.numpy()[kept], np.asarray(expected.tokens)[kept])
    np.testing.assert_array_equal(found.lengths.numpy()[kept], np.asarray(expected.lengths)[kept])
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5)


def test_methods_leave_the_modes_and_gradients_alone(theirs):
    theirs.train()
    theirs.image.eval()
    theirs.embed_images(probe_images())
    assert theirs.training and theirs.text.training and not theirs.image.training
    theirs.eval()
    assert torch.is_grad_enabled()


def test_what_a_model_cannot_do(ours, module, tmp_path):
    components = ours.components
    config = components.config
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, decoder=None, region_encoder=None, region_decoder=None),
        tasks={"contrastive": config.tasks["contrastive"]},
    )
    kept = ("image", "text", "image_projection", "text_projection", "log_scale")
    params = {"model": {name: components.params["model"][name] for name in kept}, "heads": {}}
    export_torch(tmp_path, config=config, params=params, tokenizer=components.tokenizer)
    model, image = module.load(tmp_path), probe_images()[:1]
    calls = {
        "caption": lambda: model.caption(image),
        "describe": lambda: model.describe(image, boxes=[[[0, 0, 1, 1]]]),
        "ground": lambda: model.ground(image, ["a"]),
        "segment": lambda: model.segment(image, ["a"]),
        "detect": lambda: model.detect(image, ["a"]),
    }
    for name, call in calls.items():
        with pytest.raises(module.UserError, match="not trained to"):
            call()
        del name
    (tmp_path / "config.json").unlink()
    with pytest.raises(module.UserError, match="config.json is missing"):
        module.load(tmp_path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m.embed_images(x[0]), "list of images"),
        (lambda m, x: m.embed_texts("a"), "list of texts"),
        (lambda m, x: m.embed_texts(["a"], long="whole"), "chunks"),
        (lambda m, x: m.classify(x, ["a"]), "at least two"),
        (lambda m, x: m.caption(x, beams=3, groups=2), "groups"),
        (lambda m, x: m.caption(x, top_k=3), "temperature"),
        (lambda m, x: m.caption(x, guidance=-1.0), "guidance"),
        (lambda m, x: m.caption(x, guidance_null="text"), "controls or both"),
        (lambda m, x: m.caption(x, length=99), "words from 1 to 12"),
        (lambda m, x: m.caption(x, section="advice"), "unknown"),
        (lambda m, x: m.caption(x, quality=[1]), "one for each image"),
        (lambda m, x: m.caption(x, max_length=99), "up to 15"),
        (lambda m, x: m.describe(x, boxes=[[[0, 0, 50, 50]]] * 3), "pixels"),
        (lambda m, x: m.describe(x, boxes=[[[0.5, 0, 0.5, 1]]] * 3), "no area"),
        (lambda m, x: m.describe(x, points=[[[0.5, 0.5]]]), "3 images"),
        (lambda m, x: m.describe(x), "give one of boxes"),
        (lambda m, x: m.describe(x, boxes=[[], [], []]), "no regions"),
        *(
            (lambda m, x, name=name: getattr(m, name)([], ["a"]), "at least one")
            for name in ("ground", "segment", "detect", "heat_maps")
        ),
        (lambda m, x: m.ground(x, "a"), "list of phrases"),
        (lambda m, x: m.ground(x, [" "]), "not empty"),
        (lambda m, x: m.ground(x, ["w " * 40]), "shorten"),
        (lambda m, x: m.ground(x, ["a"], alpha=2), "alpha"),
    ],
)
def test_bad_arguments(theirs, module, call, message):
    with pytest.raises(module.UserError, match=message):
        call(theirs, probe_images())
