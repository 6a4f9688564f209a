"""The task that describes regions: its loss against loops, what its two dropouts hide, and training beside others."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation, metric_rows, tiny_config  # noqa: F401

from bvl.data.controls import Controls
from bvl.data.regions import Regions
from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.features import ImageFeatures
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder
from bvl.runs import load_components
from bvl.tasks.base import ModelInfo
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.region_caption import RegionCaption, with_masks
from bvl.train.loop import train
from bvl.train.program import Program

pytestmark = pytest.mark.usefixtures("fast_compilation")

PAD, START, END, VOCAB, PREFIX, LENGTH, IMAGES, REGIONS = 0, 1, 2, 20, 3, 6, 3, 2
INFO = ModelInfo(8, 8, 8, (), vocab_size=VOCAB, special_ids=(PAD, START, END))


def a_batch():
    """Two regions an image, of 1 to 4 words; the last image is absent, one region is not valid."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, LENGTH - 1, (IMAGES, REGIONS))
    place = np.arange(LENGTH)
    text = np.where(place <= words[..., None], rng.integers(4, VOCAB, (IMAGES, REGIONS, LENGTH)), PAD)
    text[..., 0] = START
    np.put_along_axis(text, words[..., None] + 1, END, -1)
    shown = np.arange(PREFIX) >= rng.integers(0, PREFIX, (IMAGES, REGIONS))[..., None]
    batch = {
        "region_text": text, "region_text_mask": place <= words[..., None] + 1,
        "region_valid": np.array([[True, True], [True, False], [True, True]]),
        "region_prompt": np.where(shown, rng.integers(4, VOCAB, shown.shape), PAD), "region_prompt_mask": shown,
        "region_box": rng.random((IMAGES, REGIONS, 4)), "region_point": rng.random((IMAGES, REGIONS, 2)),
        "region_mask": rng.random((IMAGES, REGIONS, 4, 4)) < 0.5, "region_kind": np.zeros((IMAGES, REGIONS), np.int8),
        "image_valid": np.array([True, True, False]),
    }  # fmt: skip
    return {name: jnp.asarray(value) for name, value in batch.items()}


class Recorder:
    """A model whose hidden states are fixed; keeps what it was asked."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.hidden = jnp.asarray(rng.normal(size=(IMAGES * REGIONS, PREFIX + LENGTH - 2, 8)), jnp.float32)
        self.table = jnp.asarray(rng.normal(size=(VOCAB, 8)), jnp.float32)

    def __call__(self, *args, method):
        if method == "visual_tokens":
            self.image_dropped = np.asarray(args[1])
            return jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 8)), jnp.ones((3, 2), bool)
        if method == "region_tokens":
            self.prompts, self.region_dropped = args[3], np.asarray(args[4])
            return 10 + jnp.arange(6.0)[:, None, None] * jnp.ones((6, 1, 8)), jnp.ones((6, 1), bool)
        if method == "vocabulary":
            return self.table
        self.visual, self.visual_mask, self.inputs = args[:3]
        return self.hidden


def context(batch, model, seed=0):
    features = {"image": ImageFeatures(tokens=jnp.zeros((IMAGES, 2, 8)), grid=(1, 2))}
    return SimpleNamespace(
        batch=batch, model=model, info=INFO, features=features, decoder_keys=None,
        keys=jax.random.split(jax.random.key(seed), IMAGES),
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_against_loops(smoothing):
    batch, model = a_batch(), Recorder()
    task = RegionCaption(label_smoothing=smoothing)
    output = task.loss(context(batch, model))
    losses, right = [], []
    for row in range(IMAGES):
        for r in range(REGIONS):
            for t in range(1, LENGTH):
                if not (batch["region_valid"][row, r] and batch["region_text_mask"][row, r, t]):
                    continue
                # The last token of the prefix predicts the first word, and so on.
                logits = np.asarray(model.table @ model.hidden[REGIONS * row + r, PREFIX + t - 2])
                log_probs = logits - np.log(np.exp(logits).sum())
                target = int(batch["region_text"][row, r, t])
                losses.append(-(1 - smoothing) * log_probs[target] - smoothing * log_probs.mean())
                right.append(logits.argmax() == target)
    assert float(output.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert [float(x) for x in output.metrics["accuracy"]] == [sum(right), len(right)]
    assert float(task.count(batch, INFO)) == len(losses)
    # The image's tokens in front, then the region's.
    np.testing.assert_array_equal(
        model.visual[..., 0], [[i, i, 10 + REGIONS * i + r] for i in range(IMAGES) for r in range(REGIONS)]
    )
    np.testing.assert_array_equal(model.prompts.box, batch["region_box"])
    whole = np.concatenate([batch["region_prompt"], batch["region_text"][..., 1:]], -1).reshape(6, -1)
    np.testing.assert_array_equal(model.inputs, whole[:, :-1])


def test_images_and_regions_are_dropped_independently():
    batch, model, image, region = a_batch(), Recorder(), [], []
    task = RegionCaption(image_dropout=0.3, region_dropout=0.4, both_dropout=0.0)
    for seed in range(150):
        task.loss(context(batch, model, seed))
        assert model.image_dropped[2] and model.region_dropped[4:].all(), "absent"
        image.append(model.image_dropped[:2])
        region.append(model.region_dropped[:4].reshape(2, 2))
    image, region = np.array(image), np.array(region)
    assert image.mean() == pytest.approx(0.3, abs=0.1)
    assert region.mean() == pytest.approx(0.4, abs=0.1)
    assert region[image].mean() == pytest.approx(0.4, abs=0.15), "whatever became of the image"
    assert (region[..., 0] != region[..., 1]).any()
    RegionCaption(image_dropout=0.0, region_dropout=0.0, both_dropout=0.0).loss(context(batch, model))
    assert model.image_dropped.sum() == 1 and model.region_dropped.sum() == 2


def test_an_image_may_be_dropped_with_all_its_regions():
    batch, model, dropped = a_batch(), Recorder(), []
    task = RegionCaption(image_dropout=0.0, region_dropout=0.0, both_dropout=0.4)
    for seed in range(150):
        task.loss(context(batch, model, seed))
        dropped.append(model.image_dropped[:2])
        np.testing.assert_array_equal(model.region_dropped, np.repeat(model.image_dropped, REGIONS))
    assert np.mean(dropped) == pytest.approx(0.4, abs=0.1)


def test_a_mask_becomes_the_fourth_channel_of_its_image():
    image = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    masks = np.zeros((2, 3, 2, 3), bool)
    masks[1, 2, 0, 1] = True
    found = np.asarray(with_masks(image, masks))
    assert found.shape == (2, 3, 4, 6, 4) and found.dtype == np.uint8
    for r in range(3):
        np.testing.assert_array_equal(found[:, r, ..., :3], image)
    expected = np.zeros((2, 3, 4, 6))
    expected[1, 2, 0:2, 2:4] = 255
    np.testing.assert_array_equal(found[..., 3], expected)


def region_config(workdir, *, tasks, image=None, **encoder):
    config = tiny_config(workdir, steps=3, batch_size=4, tasks=tasks)
    model = dataclasses.replace(
        config.model,
        image=image or ViTConfig("XXS/8", pool="mean", width=16, depth=1, num_heads=2),
        decoder=DecoderConfig(width=16, depth=1, num_heads=2),
        region_encoder=RegionEncoderConfig(**{"width": 16, "output_size": 2, "num_heads": 2, **encoder}),
    )
    regions = Regions(max_regions=3, kinds={"box": 1.0, "point": 1.0, "mask": 1.0})
    data = dataclasses.replace(config.data, regions=regions, controls=Controls(lengths=20))
    return dataclasses.replace(config, model=model, data=data)


def test_all_tasks_share_one_encoding():
    tasks = {"contrastive": Contrastive(), "caption": Caption(), "region_caption": RegionCaption()}
    views = Program.views(SimpleNamespace(tasks=tasks, frozen={}))["model"]
    assert {name: view.need for name, view in views.items()} == {
        "image": {"embed", "tokens", "visual", "regions"},
        "text": {"embed"},
    }


def test_the_gradient_reaches_every_parameter_that_regions_pass():
    """Of the region encoder itself and of the image tower below it, though all images are null."""
    config = region_config(None, tasks={"region_caption": RegionCaption()}).model
    model = DualEncoder(config, (32, 32), VOCAB, LENGTH, END, PAD, PREFIX)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(IMAGES, 32, 32, 3)), jnp.float32)
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image[:1], tokens, tokens == 0)["params"])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    batch = {**a_batch(), "image_valid": jnp.ones(IMAGES, bool)}
    task = RegionCaption(image_dropout=1.0, region_dropout=0.3, both_dropout=0.0)

    @jax.jit
    @jax.grad
    def gradient(params):
        bound = functools.partial(model.apply, {"params": params})
        features = bound(image, frozenset({"tokens", "regions"}), method="encode_image")
        ctx = context(batch, bound)
        ctx.features = {"image": features}
        return task.loss(ctx).loss

    found = gradient(params)
    for name in ("region_encoder", "image"):
        flat = jax.tree_util.tree_leaves_with_path(found[name])
        silent = [jax.tree_util.keystr(path) for path, leaf in flat if not np.abs(leaf).max() > 0]
        assert not silent, f"{name}: {silent}"


def test_training_beside_captions_with_a_mask_channel(tmp_path):
    image = ViTConfig("XXS/8", pool="mean", width=16, depth=1, num_heads=2, mask_channel=True)
    tasks = {"caption": Caption(), "region_caption": RegionCaption(weight=2.0, mask_channel=True)}
    train(region_config(tmp_path / "run", tasks=tasks, image=image, kind="mask_channel"))
    row = metric_rows(tmp_path / "run")[-1]
    expected = row["loss/caption"] + 2 * row["loss/region_caption"]
    assert row["loss/total"] == pytest.approx(expected, rel=1e-4)
    # Zero at first, so what is there now was learned from regions.
    assert np.abs(load_components(tmp_path / "run").params["model"]["image"]["mask_embed"]).max() > 0


def test_wrong_configs_are_refused():
    model = region_config(None, tasks={"region_caption": RegionCaption()}).model
    RegionCaption().check(model)
    for without in ({"region_encoder": None}, {"region_encoder": None, "decoder": None}):
        with pytest.raises(ConfigError, match=r"model\.region_encoder=RegionEncoderConfig"):
            RegionCaption().check(dataclasses.replace(model, **without))
    with pytest.raises(ConfigError, match="mask_channel=False"):
        RegionCaption(mask_channel=True).check(model)
    channel = dataclasses.replace(model, region_encoder=RegionEncoderConfig(kind="mask_channel"))
    with pytest.raises(ConfigError, match="mask_channel=True"):
        RegionCaption().check(channel)
    with pytest.raises(ConfigError, match=r"model\.image\.mask_channel=true"):
        RegionCaption(mask_channel=True).check(channel)
    image = dataclasses.replace(model.image, patch_dropout=0.5)
    with pytest.raises(ConfigError, match=r"model\.image\.patch_dropout=0"):
        RegionCaption().check(dataclasses.replace(model, image=image))
    for options in ({"image_dropout": 1.5}, {"region_dropout": -0.1}, {"label_smoothing": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            RegionCaption(**options)
