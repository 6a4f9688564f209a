"""What a run takes over from other models, and what it says of it."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PHANTOMS, assert_same_trees, fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl.config import Config, load_config, split_sources
from bvl.data.controls import Controls
from bvl.data.pipeline import training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import CheckpointError, ConfigError, UserError
from bvl.mesh import MeshConfig, make_mesh, unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.grid import resize_positions
from bvl.models.vit import ViTConfig
from bvl.runs import Components, build_model
from bvl.tasks.caption import Caption
from bvl.train.fitting import stretched_positions
from bvl.train.initial import (
    initial_params,
    open_start,
    start_of,
    with_tokenizer_options,
)
from bvl.train.loop import train
from bvl.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

MESH = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
FROZEN = OptimConfig(name="sgd", lr=1e-30, warmup_steps=0, freeze=("^(?!model/log_scale)",))
DECODER = DecoderConfig(width=32, depth=1, num_heads=2)


def tokenizer_of(config, **changes) -> Tokenizer:
    options = dataclasses.replace(config.data.tokenizer, **changes)
    sets = [RecordSet(source) for source in config.data.sources()]
    return Tokenizer.train(training_texts(sets), options).with_tokens(config.data.controls.tokens())


def changed(config: Config, *, data=None, **model) -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(config.data, **(data or {})),
    )


def values_of(config, tokenizer, seed, heads=None):
    """Random parameters of the model's shapes; nothing is compiled."""
    model = build_model(config, tokenizer)
    tokens = jnp.zeros((1, tokenizer.context_length), jnp.int32)
    image = jnp.zeros((1, *config.data.preprocess.height_width, 3))
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image, tokens, tokens == 0)["params"])
    rng = np.random.default_rng(seed)
    make = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)  # noqa: E731
    return {"model": jax.tree.map(make, shapes), "heads": jax.tree.map(make, heads or {})}


def model_of(config, seed, tokenizer=None, heads=None) -> Components:
    tokenizer = tokenizer or tokenizer_of(config)
    params = values_of(config, tokenizer, seed, heads)
    return Components(None, params, tokenizer, config.data.preprocess, config, (), None)


def started(config, sources, *, heads=None):
    """(the parameters, fresh ones, what came of them) of a run of `config`."""
    start = start_of(config, sources)
    config = with_tokenizer_options(config, start, None)
    tokenizer = start.tokenizer or tokenizer_of(config)
    tokenizer = tokenizer.with_context(config.data.tokenizer.context_length)
    fresh = values_of(config, tokenizer.with_tokens(config.data.controls.tokens()), 99, heads)
    params, diff = initial_params(start, config, fresh, MESH)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    return params, fresh, diff


BASE = tiny_config()
CAPTIONER = dataclasses.replace(changed(BASE, decoder=DECODER), tasks={"caption": Caption()})


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(BASE)


@pytest.fixture(scope="module")
def towers(tokenizer):
    return model_of(BASE, 1, tokenizer)


@pytest.fixture(scope="module")
def captioner(tokenizer):
    return model_of(CAPTIONER, 2, tokenizer)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial") / "first"
    assert train(tiny_config(folder, steps=1, optim=OptimConfig(warmup_steps=0))) == 0
    return folder


def test_parts_of_several_models_are_laid_over_each_other(towers, captioner, tokenizer):
    """The later model's parts win; a projection goes with its tower; what no model has is fresh."""
    image_alone = changed(BASE, image=ViTConfig("XXS/16", width=32, depth=2, num_heads=2), text=None)
    other_image = model_of(image_alone, 3, tokenizer)
    wanted = changed(CAPTIONER, image=image_alone.model.image)
    params, fresh, diff = started(wanted, {"captioner": captioner, "image": other_image})
    theirs = captioner.params["model"]
    for part in ("image", "image_projection"):
        assert_same_trees(params["model"][part], other_image.params["model"][part])
    for part in ("text", "text_projection", "decoder", "log_scale"):
        assert_same_trees(params["model"][part], theirs[part])
    assert set(diff.loaded.values()) == {"captioner", "image"} and not diff.new
    assert diff.skipped and all("image" in n and s == "captioner" for n, s, _ in diff.skipped)
    # The other way round the image tower is that of the model with both.
    wanted = changed(CAPTIONER)
    params, fresh, diff = started(wanted, {"image": other_image, "towers": towers})
    assert_same_trees(params["model"]["decoder"], fresh["model"]["decoder"])
    assert_same_trees(params["model"]["image"], towers.params["model"]["image"])
    assert all(name.startswith("model/decoder/") for name in diff.new)
    assert all(why == "towers has the image too" for n, _, why in diff.skipped if "image" in n)


def test_a_tower_without_a_projection_gets_a_fresh_one(tokenizer):
    text_alone = model_of(changed(BASE, image=None, text_projection="none", embed_dim=32), 4, tokenizer)
    params, fresh, diff = started(BASE, {"text": text_alone})
    assert_same_trees(params["model"]["text"], text_alone.params["model"]["text"])
    assert diff.new["model/text_projection/kernel"] == "text has no projection"
    images = jax.tree.leaves((fresh["model"]["image"], fresh["model"]["image_projection"]))
    assert sum("image" in name for name in diff.new) == len(images)
    assert diff.new["model/log_scale"] == "no model of init_from has it"


def test_a_temperature_that_was_never_trained_is_not_taken(tokenizer):
    captioner = model_of(changed(CAPTIONER, text=None), 9, tokenizer)
    params, fresh, diff = started(CAPTIONER, {"captioner": captioner})
    assert float(params["model"]["log_scale"]) == float(fresh["model"]["log_scale"])
    assert ("model/log_scale", "captioner", "two towers never met there") in diff.skipped


def test_regular_expressions(towers):
    config = dataclasses.replace(BASE, init_include=("model/(image|text)/",), init_exclude=("positions$",))
    params, fresh, diff = started(config, {"towers": towers})
    kept, new = params["model"], fresh["model"]
    assert_same_trees(kept["text"]["positions"], new["text"]["positions"])
    assert_same_trees(kept["text_projection"], new["text_projection"])
    assert_same_trees(kept["text"]["token_embed"], towers.params["model"]["text"]["token_embed"])
    assert diff.new["model/text/positions"] == "init_exclude 'positions$'"
    assert diff.new["model/text_projection/kernel"] == "not in init_include"
    assert ("model/image/positions", "towers", "init_exclude 'positions$'") in diff.skipped
    text = "\n".join(diff.lines())
    assert (
        "from towers" in text
        and "init_exclude 'positions$': model/image/positions, model/text/positions" in text
    )
    for option in ("init_include", "init_exclude"):
        wrong = dataclasses.replace(BASE, **{option: ("model/text/positons",)})
        with pytest.raises(ConfigError, match=rf"{option}: .*positons.* nearest are .*model/text/positions"):
            started(wrong, {"towers": towers})


def test_missing_and_misshapen_parameters_are_errors_unless_left_out(towers):
    deeper = changed(BASE, text=dataclasses.replace(BASE.model.text, depth=2))
    with pytest.raises(
        CheckpointError, match=r"init_from=towers: \d+ arrays .*\n.*block_1.*there absent, here"
    ):
        started(deeper, {"towers": towers})
    params, fresh, diff = started(
        dataclasses.replace(deeper, init_exclude=("text/stack/block_1/",)), {"towers": towers}
    )
    assert_same_trees(params["model"]["text"]["stack"]["block_1"], fresh["model"]["text"]["stack"]["block_1"])
    assert all("block_1" in name for name in diff.new)
    with pytest.raises(CheckpointError, match=r"text_projection/kernel: there \(32, 16\), here absent"):
        started(
            changed(BASE, text_projection="none", embed_dim=32, image_projection="none"), {"towers": towers}
        )


def test_heads_are_taken_only_where_they_are_named(towers):
    heads = {"classify": {"linear": {"kernel": jax.ShapeDtypeStruct((32, 3), jnp.float32)}}}
    other = model_of(BASE, 5, towers.tokenizer, heads=heads)
    params, fresh, diff = started(BASE, {"other": other}, heads=heads)
    assert_same_trees(params["heads"], fresh["heads"])
    assert "heads/classify/linear/kernel" in diff.new
    config = dataclasses.replace(BASE, init_include=("^model/", "^heads/"))
    params, fresh, diff = started(config, {"other": other}, heads=heads)
    assert_same_trees(params["heads"], other.params["heads"])


def test_two_vocabularies(towers, captioner):
    """The tokenizer is that of the model whose token embeddings are taken; two of them are an error."""
    smaller = dataclasses.replace(BASE.data.tokenizer, vocab_size=250)
    other = model_of(changed(CAPTIONER, data={"tokenizer": smaller}), 6)
    assert other.tokenizer.hash != towers.tokenizer.hash
    sources = {"towers": towers, "other": other}
    assert start_of(BASE, sources).tokenizer is other.tokenizer
    with pytest.raises(ConfigError, match="text .*vocabulary of towers and the decoder that of other"):
        start_of(CAPTIONER, {"other": other, "towers": towers})
    config = dataclasses.replace(CAPTIONER, init_exclude=("^model/decoder/",))
    start = start_of(config, {"other": other, "towers": towers})
    assert start.tokenizer is towers.tokenizer and start.fixed
    # Controls that only one of them has make no other vocabulary.
    controls = Controls(lengths=4)
    with_controls = model_of(
        changed(CAPTIONER, data={"controls": controls}), 7, towers.tokenizer.with_tokens(controls.tokens())
    )
    config = changed(CAPTIONER, data={"controls": controls})
    start = start_of(config, {"with": with_controls, "towers": towers})
    assert start.tokenizer is with_controls.tokenizer
    params, fresh, diff = started(config, {"with": with_controls, "towers": towers})
    rows = len(towers.params["model"]["text"]["token_embed"])
    assert_same_trees(
        params["model"]["text"]["token_embed"][rows:], fresh["model"]["text"]["token_embed"][rows:]
    )
    assert f"model/text/token_embed: 4 fresh rows behind {rows}" in diff.notes


def test_special_tokens_and_rows_of_another_model_belong_to_the_config(towers):
    """An imported model's tokenizer may have other special tokens, and its embedding more rows."""
    rows = towers.tokenizer.vocab_size + 7
    options = TokenizerConfig(vocab_size=300, context_length=16, start="", embedding_rows=rows)
    config = changed(BASE, data={"tokenizer": options})
    foreign = model_of(config, 8, tokenizer_of(BASE))
    settled = with_tokenizer_options(BASE, start_of(BASE, {"foreign": foreign}), None)
    assert settled.data.tokenizer.start == "" and settled.data.tokenizer.embedding_rows == rows
    # On a resume the models are not read again: the run's own config has them.
    assert with_tokenizer_options(BASE, None, settled) == settled
    params, _, diff = started(BASE, {"foreign": foreign})
    assert params["model"]["text"]["token_embed"].shape == (rows, 32) and not diff.notes


def test_controls_that_the_other_run_had_not_get_fresh_rows(captioner):
    """At the end of the vocabulary, and of the decoder's positions since the prefix is longer."""
    controls = Controls(lengths=4)
    config = changed(CAPTIONER, data={"controls": controls})
    params, fresh, diff = started(config, {"captioner": captioner})
    old, new, kept = captioner.params["model"], fresh["model"], params["model"]
    for part, name in (("text", "token_embed"), ("decoder", "token_embed"), ("decoder", "positions")):
        rows = len(old[part][name])
        assert len(kept[part][name]) > rows
        np.testing.assert_array_equal(kept[part][name][:rows], old[part][name])
        np.testing.assert_array_equal(kept[part][name][rows:], new[part][name][rows:])
        assert f"model/{part}/{name}: {len(kept[part][name]) - rows} fresh rows behind {rows}" in diff.notes
    np.testing.assert_array_equal(kept["text"]["positions"], old["text"]["positions"])
    # Fewer slots leave the first positions; no vocabulary shrinks.
    rich = Components(None, params, captioner.tokenizer, config.data.preprocess, config, (), None)
    with pytest.raises(CheckpointError, match="decoder/token_embed"):
        started(CAPTIONER, {"rich": rich})
    fewer = changed(config, data={"controls": Controls(quality=4)})
    longer_prefix = changed(config, data={"controls": Controls(lengths=4, prompt="view", prompt_tokens=3)})
    assert longer_prefix.data.controls.num_slots > fewer.data.controls.num_slots


def test_a_longer_context_stretches_the_text_positions(captioner):
    """The first ones stay; so do a decoder's, where the rows of added controls are fresh all the same."""
    options = dataclasses.replace(BASE.data.tokenizer, context_length=28)
    controls = Controls(lengths=4)
    config = changed(CAPTIONER, data={"tokenizer": options, "controls": controls})
    config = dataclasses.replace(config, init_kept_positions=4)
    params, fresh, diff = started(config, {"captioner": captioner})
    old, kept = captioner.params["model"], params["model"]
    np.testing.assert_array_equal(kept["text"]["positions"][:4], old["text"]["positions"][:4])
    # 12 of 16 rows become 24: every second row is an old one, those between are means.
    np.testing.assert_allclose(kept["text"]["positions"][4::2], old["text"]["positions"][4:], atol=1e-6)
    between = (old["text"]["positions"][4:-1] + old["text"]["positions"][5:]) / 2
    np.testing.assert_allclose(kept["text"]["positions"][5:-1:2], between, atol=1e-6)
    rows = 1 + 28
    stretched = stretched_positions(old["decoder"]["positions"], rows, 4)
    np.testing.assert_allclose(kept["decoder"]["positions"][:rows], stretched, atol=1e-6)
    np.testing.assert_array_equal(
        kept["decoder"]["positions"][rows:], fresh["model"]["decoder"]["positions"][rows:]
    )
    assert any(n.startswith("model/text/positions: the first 4 of 16 rows kept") for n in diff.notes)
    # A table too short for the usual 20 keeps its half; a shorter context takes the first.
    _, _, diff = started(changed(BASE, data={"tokenizer": options}), {"captioner": captioner})
    assert any("the first 8 of 16 rows kept, the others stretched to 28" in n for n in diff.notes)
    options = dataclasses.replace(BASE.data.tokenizer, context_length=9)
    params, _, diff = started(changed(BASE, data={"tokenizer": options}), {"captioner": captioner})
    np.testing.assert_array_equal(params["model"]["text"]["positions"], old["text"]["positions"][:9])
    assert "model/text/positions: the first 9 of 16 rows" in diff.notes


def test_positions_of_long_clip():
    """From 77 to 248: 20 kept, of the others every fourth is an old one, and the last slope goes on."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(77, 3)), jnp.float32)
    long = stretched_positions(table, 248, 20)
    assert long.shape == (248, 3)
    np.testing.assert_array_equal(long[:20], table[:20])
    np.testing.assert_allclose(long[20::4], table[20:], atol=1e-5)
    np.testing.assert_allclose(long[21:-4:4], 0.75 * table[20:-1] + 0.25 * table[21:], atol=1e-5)
    np.testing.assert_allclose(long[247], table[76] + 0.75 * (table[76] - table[75]), atol=1e-5)


def test_image_positions_are_resampled(towers):
    config = changed(BASE, data={"preprocess": Preprocess(image_size=48)})
    params, _, diff = started(config, {"towers": towers})
    old, new = (p["model"]["image"]["positions"] for p in (towers.params, params))
    np.testing.assert_allclose(new, resize_positions(old, (2, 2), (3, 3)), atol=1e-6)
    assert diff.notes == ["model/image/positions: resampled from a grid of (2, 2) to (3, 3)"]


def test_positions_of_another_size_than_the_images(tokenizer):
    """They stay, where position_size says their grid; else they are resampled as the model itself does it."""
    image = dataclasses.replace(BASE.model.image, position_size=(64, 48), position_resize="plain")
    there = changed(BASE, image=image)
    source = model_of(there, 11, tokenizer)
    larger = {"preprocess": Preprocess(image_size=48)}
    old = source.params["model"]["image"]["positions"]
    params, _, diff = started(changed(there, data=larger), {"source": source})
    np.testing.assert_array_equal(params["model"]["image"]["positions"], old)
    assert not diff.notes
    image = dataclasses.replace(image, position_size=None)
    params, _, _ = started(changed(there, data=larger, image=image), {"source": source})
    expected = resize_positions(old, (4, 3), (3, 3), how="plain")
    np.testing.assert_allclose(params["model"]["image"]["positions"], expected, atol=1e-6)


def test_a_run_writes_and_logs_what_it_took(first_run, tmp_path, caplog):
    config = tiny_config(
        tmp_path / "run", steps=1, init_from=str(first_run), init_exclude=("text_projection",), optim=FROZEN
    )
    with caplog.at_level(logging.INFO):
        assert train(config) == 0
    there, here = (saved_items(run)["params"]["model"] for run in (first_run, tmp_path / "run"))
    projections = [tree.pop("text_projection")["kernel"] for tree in (there, here)]
    assert np.abs(projections[0] - projections[1]).max() > 0
    assert_same_trees(here, there)
    written = json.loads((tmp_path / "run" / "init.json").read_text())
    assert written["new"] == {"model/text_projection/kernel": "init_exclude 'text_projection'"}
    assert set(written["loaded"].values()) == {str(first_run)}
    assert "new, init_exclude 'text_projection': model/text_projection/kernel" in caplog.text
    # It is new, and nothing trains it.
    assert "new parameters that are not trained" in caplog.text


def test_bad_sources(first_run, tmp_path):
    for spec in (str(tmp_path / "nothing"), f"{first_run},{tmp_path / 'nothing'}"):
        with pytest.raises(UserError, match="nothing"):
            open_start(dataclasses.replace(BASE, init_from=spec))
    with pytest.raises(ConfigError, match="init_from='a,,b'"):
        split_sources("a,,b")
    with pytest.raises(ConfigError, match="name one"):
        open_start(dataclasses.replace(BASE, init_exclude=("text",)))
    with pytest.raises(ConfigError, match="no regular expression"):
        dataclasses.replace(BASE, init_include=("(",))
    assert split_sources(("runs/a", "hf:b")) == split_sources("runs/a, hf:b") == ("runs/a", "hf:b")


def test_a_config_can_be_made_from_a_key(tmp_path):
    """Keyword-only parameters of get_config get what the overrides say."""
    (tmp_path / "c.py").write_text(
        "from tiny_run import tiny_config\n"
        "def get_config(arg=None, *, init_from=None):\n"
        "    return tiny_config(steps=len(init_from or 'abc'))\n"
    )
    assert load_config(str(tmp_path / "c.py")).steps == 3
    config = load_config(str(tmp_path / "c.py"), ["init_from=2024", "batch_size=4"])
    assert (config.steps, config.init_from, config.batch_size) == (4, "2024", 4)
