"""configs/finetune.py and the config that a run takes over from other models."""

import ast
import contextlib
import dataclasses
import io
import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import assert_same_trees, fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl.assembly import build_model
from bvl.cli import main
from bvl.config import dump, flatten, load_config
from bvl.data.controls import Controls
from bvl.data.text import Tokenizer
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError, UserError
from bvl.evals.table import print_table
from bvl.mesh import unbox
from bvl.models.bert import BertConfig
from bvl.models.decoder import DecoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.base import ModelInfo
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive
from bvl.train.loop import train
from bvl.train.lora import Adapter
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.parameters import named_leaves
from bvl.train.program import Program
from bvl.train.source_config import source_config

pytestmark = pytest.mark.usefixtures("fast_compilation")

CONFIG = Path(__file__).parent.parent / "configs" / "finetune.py"
IMAGE = ViTConfig("XXS/16", width=32, depth=1, num_heads=2)
TEXT = BertConfig("tiny", hidden_size=48, depth=1, num_heads=2, mlp_hidden=64)
DECODER = DecoderConfig(width=32, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two small towers."""
    folder = tmp_path_factory.mktemp("finetune") / "source"
    assert train(tiny_config(folder, steps=1, optim=OptimConfig(warmup_steps=0))) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A CSV of two columns, beside its images."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = ["image,text"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (40, 32, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a scan with finding {i} on the left")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.csv"


def written(folder: Path, model: DualEncoderConfig, **changes) -> str:
    """A folder that says what model it holds; the config is all that is read of it here."""
    folder.mkdir()
    config = tiny_config(tasks={"contrastive": Contrastive()})
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **changes))
    (folder / "config.json").write_text(dump(config))
    return str(folder)


def overrides(source, pairs, workdir, *more):
    return [
        f"init_from={source}", f"data.root={pairs}", f"workdir={workdir}", "batch_size=8", "eval.every=0",
        "optim.warmup_steps=1", "log.tensorboard=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(source, pairs, tmp_path_factory):
    """(model, words, run folder, what was printed) of steps with low-rank factors by the command line."""
    copy = shutil.copytree(source, tmp_path_factory.mktemp("gone") / "source")
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    words = overrides(copy, pairs, workdir, "steps=3", "checkpoint.every=2", "optim.lora.rank=2")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["train", f"{CONFIG}:recipe=lora", *words]) == 0
    return copy, words, workdir, printed.getvalue()


def test_a_model_is_tuned_on_pairs(tuned, source):
    """Towers, tokenizer and preprocessing are those of the model; the metrics before training are kept."""
    _, _, run, _ = tuned
    config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (run, source))
    assert config["model"] == theirs["model"]
    assert config["data"]["preprocess"] == theirs["data"]["preprocess"]
    assert (run / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert json.loads((run / "init.json").read_text())["new"] == {}
    before, after = (json.loads((run / name).read_text()) for name in ("eval/before.json", "eval.json"))
    assert before.keys() == after.keys() and "retrieval_held_out/t2i_r10" in before
    provenance = [e["retrieval_held_out/provenance"] for e in (before, after)]
    assert [p["step"] for p in provenance] == [0, 3]
    assert provenance[0]["split_hash"] == provenance[1]["split_hash"]
    assert provenance[0]["weights_hash"] != provenance[1]["weights_hash"]
    old, new = (named_leaves(saved_items(folder)["params"]) for folder in (source, run))
    moved = {name for name in new if np.abs(new[name] - old[name]).max() > 0}
    assert moved == {
        n for n in new if "attention/query/k" in n or "attention/value/k" in n or "projection" in n
    } | {"model/log_scale"}


def test_both_columns(tuned, capsys):
    _, _, run, printed = tuned
    before, after = (json.loads((run / name).read_text()) for name in ("eval/before.json", "eval.json"))
    lines = printed.splitlines()
    assert any("before" in line and "value" in line for line in lines)
    name = "retrieval_held_out/t2i_r5"
    row = next(line for line in lines if f" {name} " in line)
    assert f"{before[name]:.4f}" in row and f"{after[name]:.4f}" in row
    print_table(after)
    assert "before" not in capsys.readouterr().out


def test_a_resume_needs_no_source(tuned, tmp_path):
    copy, words, run, _ = tuned
    here = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(here / "checkpoints" / "3")
    shutil.rmtree(copy)
    words = [f"workdir={here}" if w.startswith("workdir=") else w for w in words]
    assert main(["train", f"{CONFIG}:recipe=lora", *words]) == 0
    assert_same_trees(saved_items(here)["params"], saved_items(run)["params"])


def test_a_dry_run_prints_the_resolved_config(source, capsys):
    """Also with changes of what comes from the model."""
    doc = ast.get_docstring(ast.parse(CONFIG.read_text(encoding="utf-8"))).replace("\\\n", " ")
    command = next(line.strip() for line in doc.splitlines() if line.strip().startswith("bvl train"))
    words = shlex.split(command.replace("open_clip:path/to/model", str(source)))[1:]
    words[1] = words[1].replace("configs/finetune.py", str(CONFIG))
    more = ["data.preprocess.image_size=48", "model.text.dropout=0.1"]
    assert main([*words, *more, "--dry-run"]) == 0
    printed = flatten(json.loads(capsys.readouterr().out))
    for key, _, value in (word.partition("=") for word in [*words[2:], *more]):
        assert str(printed[key]) == value
    assert printed["model.text.width"] == 32 and printed["optim.lora.rank"] == 8


def trained_by(config) -> set[str]:
    """Names of the parameters that a config trains, factors by their kernel's."""
    tokenizer = Tokenizer.without_words(config.data.tokenizer.context_length)
    program = Program(
        model=build_model(config, tokenizer), preprocess=config.data.preprocess, tasks=config.tasks,
        info=ModelInfo(32, 32, 16, ()), mesh=None, seed=0, ema_decay=0.0, frozen={}, adapter=Adapter.of(config.optim),
    )  # fmt: skip
    shapes = unbox(jax.eval_shape(program.init_params, jax.random.key(0)))
    optimizer = make_optimizer(config.optim, config.steps, shapes)
    return {name for name in named_leaves(shapes) if optimizer.trains(name)}


@pytest.mark.parametrize("recipe", ("full", "frozen_tower", "layer_decay", "low_rate"))
def test_recipes(recipe, source):
    names = trained_by(load_config(f"{CONFIG}:recipe={recipe}", [f"init_from={source}"]))
    towers = {name.split("/")[1] for name in names}
    assert ("image" in towers) == (recipe != "frozen_tower") and "text" in towers
    if recipe == "frozen_tower":
        other = load_config(f"{CONFIG}:recipe=frozen_tower,tower=text", [f"init_from={source}"])
        assert "text" not in {name.split("/")[1] for name in trained_by(other)}


def test_towers_of_two_models(tmp_path):
    """An image tower alone and a text tower alone get a new space; one that had a space keeps it."""
    alone = dict(text_projection="none", embed_dim=48)
    vision = written(
        tmp_path / "vision", DualEncoderConfig(image=IMAGE, text=None, image_projection="none", embed_dim=32),
        preprocess=Preprocess(image_size=48),
    )  # fmt: skip
    bert = written(tmp_path / "bert", DualEncoderConfig(image=None, text=TEXT, **alone))
    both = written(
        tmp_path / "both",
        DualEncoderConfig(
            image=IMAGE, text=tiny_config().model.text, embed_dim=24, init_bias=-10.0, init_temperature=0.1
        ),
    )
    found = source_config(f"{vision},{bert}")
    assert (found.model.image, found.model.text, found.model.embed_dim) == (IMAGE, TEXT, 32)
    assert found.model.image_projection == found.model.text_projection == "linear"
    assert found.preprocess.image_size == 48 and found.tasks == {"contrastive": Contrastive()}
    found = source_config((both, bert))
    assert (found.model.text, found.model.embed_dim, found.model.init_bias) == (TEXT, 24, -10.0)
    assert found.model.text_projection == "linear" and found.tasks["contrastive"].loss_type == "sigmoid"
    for spec, message in ((vision, "reads or writes text"), (bert, "no model has an image tower")):
        with pytest.raises(ConfigError, match=message):
            source_config(spec)


def test_a_language_model_learns_to_see(tmp_path):
    """Its new parts are trained beside the low-rank factors."""
    vision = written(
        tmp_path / "vision", DualEncoderConfig(image=IMAGE, text=None, image_projection="none", embed_dim=32)
    )
    language = written(
        tmp_path / "language",
        DualEncoderConfig(image=None, text=None, decoder=DECODER),
        controls=Controls(lengths=4),
    )
    config = load_config(f"{CONFIG}:recipe=lora", [f"init_from={vision},{language}"])
    assert isinstance(config.tasks["caption"], Caption) and "contrastive" not in config.tasks
    assert config.data.controls.lengths == 4 and list(config.eval.suites) == ["caption_held_out"]
    names = trained_by(config)
    assert "model/decoder/visual_tokens/null" in names and "model/decoder/block_0/cross/out/kernel" in names
    assert "lora/model/decoder/block_0/attention/query/kernel/a" in names
    assert "model/decoder/block_0/attention/query/kernel" not in names


@pytest.mark.parametrize(
    "arg, words, message",
    [
        ("recipe=lorra", ["init_from=x"], "recipe='lorra' is unknown; did you mean 'lora'"),
        ("tower=both", ["init_from=x"], "tower='both'"),
        ("", [], "add init_from="),
        ("", ["init_from=nowhere"], "nowhere"),
        ("", ["init_from=hf:nowhere"], "nowhere"),
    ],
)
def test_bad_input(arg, words, message):
    with pytest.raises(UserError, match=message):
        load_config(f"{CONFIG}:{arg}", words)
