"""Mosaics of images: what lies where, how many there are, and that a cell is contrasted with its own image's text."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation, metric_rows, tiny_config  # noqa: F401

from bvl.errors import ConfigError
from bvl.losses.contrastive import naive_softmax_loss
from bvl.losses.targets import same_text
from bvl.models.features import ImageFeatures, TextFeatures
from bvl.models.vit import ViTConfig
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.mosaic import Mosaic, cell_boxes, make_mosaics
from bvl.train.loop import train

pytestmark = pytest.mark.usefixtures("fast_compilation")


def constant_images(count, size=(12, 24)):
    """Each of one grey of its own."""
    return jnp.broadcast_to(
        jnp.arange(1, count + 1, dtype=jnp.uint8)[:, None, None, None] * 7, (count, *size, 3)
    )


def test_every_image_lies_in_its_cell():
    """Two of 2 x 2 and then two of 3 x 3 out of 27 images, row by row; the last one is in none."""
    mosaics = np.asarray(make_mosaics(constant_images(27), (2, 3)))
    assert mosaics.shape == (4, 12, 24, 3) and mosaics.dtype == np.uint8
    image = 0
    for number, k in ((0, 2), (1, 2), (2, 3), (3, 3)):
        for x0, y0, x1, y1 in np.asarray(cell_boxes(k)):
            image += 1
            # Without the border, to which the neighbours lend a little.
            rows = slice(round(y0 * 12) + 1, round(y1 * 12) - 1)
            columns = slice(round(x0 * 24) + 1, round(x1 * 24) - 1)
            assert np.unique(mosaics[number, rows, columns]).tolist() == [7 * image]
    assert image == 26


def test_images_are_shrunk_and_not_cut():
    """A bright left half is a bright left half of the cell, at sizes that the grid does not divide as well."""
    image = np.zeros((9, 16, 16, 3), np.uint8)
    image[:, :, :8] = 200
    mosaic = np.asarray(make_mosaics(jnp.asarray(image), (3,)), np.float32)[0, ..., 0]
    assert mosaic.shape == (16, 16)
    profile = mosaic.mean(0)
    expected = [
        np.mean([(3 * (x + s) / 16) % 1 < 0.5 for s in np.linspace(0.01, 0.99, 50)]) for x in range(16)
    ]
    assert np.abs(profile / 200 - expected).mean() < 0.1
    np.testing.assert_array_equal(mosaic, np.broadcast_to(mosaic[:1], (16, 16)))


def test_batches_that_are_too_small():
    with pytest.raises(ConfigError, match="2x2, 3x3, 4x4 images need a batch_size of at least 29; it is 28"):
        make_mosaics(constant_images(28), Mosaic().grids)
    assert len(make_mosaics(constant_images(29), Mosaic().grids)) == 3
    for grids in ((), (1, 2), (2, 2)):
        with pytest.raises(ConfigError, match="mosaic grids"):
            Mosaic(grids=grids)


def context(patches, text, grid, *, rows, ids=None, image_valid=None, text_valid=None):
    texts = text.shape[0] // rows
    batch = {
        "image": jnp.zeros((rows, 1, 1, 3)),
        "image_valid": jnp.ones(rows, bool) if image_valid is None else jnp.asarray(image_valid),
        "text_valid": jnp.ones((rows, texts), bool) if text_valid is None else jnp.asarray(text_valid),
        "text_id": jnp.arange(rows * texts, dtype=jnp.uint32).reshape(rows, texts) if ids is None else ids,
    }
    features = {
        "mosaic/image": ImageFeatures(patch_embed=patches, grid=grid),
        "text": TextFeatures(embed=text),
    }
    return SimpleNamespace(batch=batch, features=features, scale=jnp.float32(50.0), mesh=None)


def planted(order):
    """A 2 x 2 mosaic of 4 x 4 patches, those in cell i like the text of image order[i]; five images, one in no mosaic."""
    text = np.eye(5, 6, dtype=np.float32)
    patches = np.zeros((1, 4, 4, 6), np.float32)
    for i, (y, x) in enumerate(np.ndindex(2, 2)):
        patches[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = text[order[i]]
    return jnp.asarray(patches).reshape(1, 16, 6), jnp.asarray(text)


def test_cells_are_contrasted_with_their_own_texts():
    """The loss is near 0 in the right order and in no other."""
    task = Mosaic(grids=(2,))
    value = {
        order: float(task.loss(context(*planted(order), (4, 4), rows=5)).loss)
        for order in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (0, 1, 2, 4))
    }
    assert value.pop((0, 1, 2, 3)) < 1e-3
    assert min(value.values()) > 5


def test_loss_against_the_plain_one():
    """Two 2 x 2 and two 3 x 3 mosaics on 5 x 5 patches, cells by the share of each patch, two texts an image, rows absent."""
    rng = np.random.default_rng(0)
    rows, grid, dim = 28, (5, 5), 6
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    patches, text = unit(rng.normal(size=(4, 25, dim))), unit(rng.normal(size=(2 * rows, dim)))
    ids = jnp.asarray(rng.integers(0, 20, (rows, 2)), jnp.uint32)
    image_valid, text_valid = rng.random(rows) < 0.8, rng.random((rows, 2)) < 0.7
    cells = []
    fine = patches.reshape(4, 5, 5, dim).repeat(6, 1).repeat(6, 2)
    for number, k in ((0, 2), (1, 2), (2, 3), (3, 3)):
        step = 30 // k
        for i, j in np.ndindex(k, k):
            cells.append(fine[number, i * step : (i + 1) * step, j * step : (j + 1) * step].mean((0, 1)))
    shown = np.arange(rows) < 26
    padded = np.concatenate([unit(np.array(cells)), np.zeros((2, dim))])
    expected = naive_softmax_loss(
        jnp.float32(padded), jnp.float32(text), scale=50.0, targets=same_text(ids, ids.reshape(-1)),
        image_valid=jnp.asarray(image_valid & shown & text_valid.any(1)),
        text_valid=jnp.asarray((text_valid & image_valid[:, None]).reshape(-1)),
    )  # fmt: skip
    ctx = context(
        jnp.float32(patches),
        jnp.float32(text),
        grid,
        rows=rows,
        ids=ids,
        image_valid=image_valid,
        text_valid=text_valid,
    )
    output = Mosaic(grids=(2, 3)).loss(ctx)
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(output.metrics["cells"][0]) == (image_valid & shown & text_valid.any(1)).sum()


def test_texts_may_be_frozen():
    patches, text = planted((1, 0, 2, 3))

    def slopes(freeze):
        task = Mosaic(grids=(2,), freeze_texts=freeze)
        loss = lambda p, t: task.loss(context(p, t, (4, 4), rows=5)).loss  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(patches, text)

    of_patches, of_text = slopes(True)
    assert np.abs(of_patches).max() > 0 and not np.asarray(of_text).any()
    of_patches, of_text = slopes(False)
    assert np.abs(of_patches).max() > 0 and np.abs(of_text).max() > 0


def test_training_beside_whole_images(tmp_path):
    tasks = {"contrastive": Contrastive(), "mosaic": Mosaic(grids=(2,), weight=0.5)}
    train(tiny_config(tmp_path / "run", tasks=tasks, steps=3))
    row = metric_rows(tmp_path / "run")[-1]
    assert row["loss/total"] == pytest.approx(row["loss/contrastive"] + 0.5 * row["loss/mosaic"], rel=1e-4)


def test_patches_that_were_left_out():
    config = tiny_config().model
    Mosaic().check(config)
    image = ViTConfig("XXS/16", pool="mean", width=32, depth=1, num_heads=2, patch_dropout=0.5)
    with pytest.raises(ConfigError, match=r"model\.image\.patch_dropout=0"):
        Mosaic().check(dataclasses.replace(config, image=image))
