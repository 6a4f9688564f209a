"""The captioning task: its loss against loops, what image dropout hides, and one encoding for all tasks."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation, metric_rows, tiny_config  # noqa: F401

from bvl.data.controls import Controls
from bvl.data.sources import Source
from bvl.errors import ConfigError
from bvl.models.decoder import DecoderConfig
from bvl.models.features import ImageFeatures
from bvl.runs import load_components
from bvl.tasks.base import ModelInfo
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive
from bvl.train.loop import train
from bvl.train.program import Program

PAD, START, END, MASK, VOCAB, PREFIX, LENGTH = 0, 1, 2, 3, 20, 3, 6
INFO = ModelInfo(8, 8, 8, (), vocab_size=VOCAB, mask_id=MASK, special_ids=(PAD, START, END))


def a_batch(rows=4, texts=2):
    """Texts of 1 to 4 words, two an image; prefixes of one to three tokens, padded on the left."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, LENGTH - 1, (rows, texts))
    place = np.arange(LENGTH)
    text = np.where(place <= words[..., None], rng.integers(4, VOCAB, (rows, texts, LENGTH)), PAD)
    text[..., 0] = START
    np.put_along_axis(text, words[..., None] + 1, END, -1)
    shown = np.arange(PREFIX) >= rng.integers(0, PREFIX, (rows, texts))[..., None]
    prompt = np.where(shown, rng.integers(4, VOCAB, shown.shape), PAD)
    batch = {
        "text": text, "text_mask": place <= words[..., None] + 1, "text_valid": rng.random((rows, texts)) < 0.7,
        "prompt": prompt, "prompt_mask": shown, "image_valid": np.array([True, True, True, False]),
    }  # fmt: skip
    return {name: jnp.asarray(value) for name, value in batch.items()}


class Recorder:
    """A model whose hidden states are fixed; keeps what it was asked."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.hidden = jnp.asarray(rng.normal(size=(8, PREFIX + LENGTH - 2, 8)), jnp.float32)
        self.table = jnp.asarray(rng.normal(size=(VOCAB, 8)), jnp.float32)

    def __call__(self, *args, method):
        if method == "visual_tokens":
            self.dropped = np.asarray(args[1])
            return jnp.arange(4.0)[:, None, None] * jnp.ones((4, 2, 8)), jnp.ones((4, 2), bool)
        if method == "vocabulary":
            return self.table
        self.visual, _, self.inputs, self.mask, self.parallel, self.keys = args
        return self.hidden


def context(batch, model, keys=None):
    return SimpleNamespace(
        batch=batch, model=model, info=INFO, features={"image": ImageFeatures(tokens=jnp.zeros((4, 2, 8)))},
        keys=jax.random.split(jax.random.key(0), 4) if keys is None else keys, decoder_keys=None,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_against_loops(smoothing):
    batch, model = a_batch(), Recorder()
    task = Caption(image_dropout=0.0, label_smoothing=smoothing)
    output = task.loss(context(batch, model))
    losses, right = [], []
    for row in range(4):
        for k in range(2):
            for t in range(1, LENGTH):
                if not (batch["text_valid"][row, k] and batch["text_mask"][row, k, t]):
                    continue
                # The last token of the prefix predicts the first word, and so on.
                logits = np.asarray(model.table @ model.hidden[2 * row + k, PREFIX + t - 2])
                log_probs = logits - np.log(np.exp(logits).sum())
                target = int(batch["text"][row, k, t])
                losses.append(-(1 - smoothing) * log_probs[target] - smoothing * log_probs.mean())
                right.append(logits.argmax() == target)
    assert float(output.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert [float(x) for x in output.metrics["accuracy"]] == [sum(right), len(right)]
    assert float(task.count(batch, INFO)) == len(losses)
    np.testing.assert_array_equal(model.visual[:, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    expected = np.concatenate([batch["prompt"], batch["text"][..., 1:]], -1).reshape(8, -1)
    np.testing.assert_array_equal(model.inputs, expected[:, :-1])


def test_a_batch_without_texts_has_loss_zero():
    batch = {**a_batch(), "text_valid": jnp.zeros((4, 2), bool)}
    assert float(Caption().loss(context(batch, Recorder())).loss) == 0.0


def test_image_dropout_hides_its_share_and_every_absent_image():
    batch, model, task, share = a_batch(), Recorder(), Caption(image_dropout=0.3), []
    for seed in range(100):
        task.loss(context(batch, model, jax.random.split(jax.random.key(seed), 4)))
        assert model.dropped[3]
        share.append(model.dropped[:3].mean())
    assert np.mean(share) == pytest.approx(0.3, abs=0.1)
    Caption(image_dropout=0.0).loss(context(batch, model))
    assert model.dropped.tolist() == [False, False, False, True]


def test_parallel_rows_read_mask_tokens_and_keep_their_prefix():
    batch, model = a_batch(), Recorder()
    Caption(parallel=0.5).loss(context(batch, model))
    parallel = np.asarray(model.parallel)
    assert 0 < parallel.sum() < 8 and (parallel[::2] == parallel[1::2]).all(), "all texts of an image"
    whole = np.concatenate([batch["prompt"], batch["text"][..., 1:]], -1).reshape(8, -1)[:, :-1]
    np.testing.assert_array_equal(model.inputs[~parallel], whole[~parallel])
    np.testing.assert_array_equal(model.inputs[parallel][:, :PREFIX], whole[parallel][:, :PREFIX])
    assert (model.inputs[parallel][:, PREFIX:] == MASK).all()


def captioner(workdir=None, *, text=True, layout="gpt2", tasks=None, **changes):
    config = tiny_config(workdir, steps=4, tasks=tasks or {"caption": Caption()}, **changes)
    decoder = DecoderConfig(layout=layout, width=16, depth=2, num_heads=2)
    model = dataclasses.replace(config.model, decoder=decoder, **({} if text else {"text": None}))
    data = dataclasses.replace(config.data, controls=Controls(lengths=20))
    return dataclasses.replace(config, model=model, data=data)


def test_a_captioner_beside_contrast_encodes_images_once(tmp_path, monkeypatch, fast_compilation):  # noqa: F811
    calls = []
    encode = Program.encode

    def counted(self, model, preprocess, params, batch, views, **kwargs):
        calls.append(views)
        return encode(self, model, preprocess, params, batch, views, **kwargs)

    monkeypatch.setattr(Program, "encode", counted)
    tasks = {"contrastive": Contrastive(weight=1.0), "caption": Caption(weight=2.0)}
    train(captioner(tmp_path / "run", text=False, layout="coca", tasks=tasks))
    assert {name: view.need for name, view in calls[0].items()} == {
        "image": {"embed", "visual"},
        "text": {"embed"},
    }
    row = metric_rows(tmp_path / "run")[-1]
    assert row["loss/total"] == pytest.approx(row["loss/contrastive"] + 2 * row["loss/caption"], rel=1e-4)
    params = load_components(tmp_path / "run").params["model"]
    assert "text" not in params and "unimodal_norm" in params["decoder"]


def test_a_captioner_starts_from_towers_trained_without_a_decoder(tmp_path, fast_compilation):  # noqa: F811
    contrast = captioner(tmp_path / "towers", tasks={"contrastive": Contrastive()})
    contrast = dataclasses.replace(contrast, model=dataclasses.replace(contrast.model, decoder=None))
    train(contrast)
    train(captioner(tmp_path / "run", init_from=str(tmp_path / "towers"), optim=dataclasses.replace(
        contrast.optim, freeze=("^model/image/",))))  # fmt: skip
    towers, run = (load_components(tmp_path / name).params["model"] for name in ("towers", "run"))
    jax.tree.map(np.testing.assert_array_equal, run["image"], towers["image"])
    assert "decoder" in run


@pytest.mark.parametrize("alone", [False, True])
def test_image_dropout_of_one_trains_a_language_model_without_images(tmp_path, alone, fast_compilation):  # noqa: F811
    """alone: the model has no image tower, so its decoder has no cross-attention."""
    texts = tmp_path / "texts.csv"
    texts.write_text("id,text\n" + "".join(f"t{i},a nodule in lung {i % 7}\n" for i in range(20)))
    config = captioner(tmp_path / "run", text=False, tasks={"caption": Caption(image_dropout=1.0)})
    data = dataclasses.replace(config.data, train=(Source(root=str(texts)),))
    model = dataclasses.replace(config.model, image=None) if alone else config.model
    train(dataclasses.replace(config, data=data, model=model))
    assert metric_rows(tmp_path / "run")[-1]["loss/caption"] > 0
    block = load_components(tmp_path / "run").params["model"]["decoder"]["block_1"]
    assert ("cross" in block) is not alone


def test_a_task_without_a_decoder_and_wrong_rates_are_refused():
    with pytest.raises(ConfigError, match="set model.decoder"):
        Caption().check(tiny_config().model)
    for options in ({"image_dropout": 1.5}, {"parallel": -0.1}, {"label_smoothing": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Caption(**options)
    with pytest.raises(ConfigError, match="no mask token"):
        Caption(parallel=0.5).heads(dataclasses.replace(INFO, mask_id=None))
    model = captioner().model
    with pytest.raises(ConfigError, match="needs an image tower.*image_dropout=1"):
        Caption().check(dataclasses.replace(model, image=None))
    with pytest.raises(ConfigError, match="model.decoder.null=False"):
        Caption().check(dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, null=False)))
