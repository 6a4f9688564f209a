"""The run folder: its lock, whom it belongs to, and loading it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny_run import PHANTOMS, fast_compilation, saved_items, tiny_config  # noqa: F401

from bvl import config as config_lib
from bvl.config import CheckpointConfig, EvalConfig
from bvl.data.phantoms import MODALITY_PROMPTS
from bvl.data.sources import Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.errors import CheckpointError, ConfigError, RunFolderError
from bvl.evals.zeroshot import ZeroShot
from bvl.models.bert import BertConfig
from bvl.models.text import TextConfig
from bvl.runs import RunFolder, load_components
from bvl.tasks.contrastive import Contrastive, embed_images, embed_texts
from bvl.tasks.mlm import MaskedLanguageModel
from bvl.train.loop import train
from bvl.train.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

HOLD = """
import sys, time
from bvl.runs import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(120)
"""


def test_lock(tmp_path):
    """The second process is told who holds the folder; kill -9 of the holder frees it."""
    run = RunFolder(tmp_path / "a" / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid} on {os.uname().nodename}"):
            with run.lock():
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
        with run.lock():
            assert f"process {os.getpid()} " in (run.path / ".lock").read_text()
    finally:
        holder.kill()
        holder.stdout.close()
        holder.wait(20)
    with run.lock():
        pass


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match=f"workdir {path} cannot be written"):
            with RunFolder(path).lock():
                pass


def test_claim_by_the_same_config(tmp_path):
    run = RunFolder(tmp_path / "run")
    config = tiny_config(run.path)
    run.claim(config, force=False)
    (run.checkpoints / "2").mkdir(parents=True)
    run.claim(config, force=False)
    # What changes no number may differ.
    free = dataclasses.replace(
        config, log=dataclasses.replace(config.log, every=1), checkpoint=CheckpointConfig(every=1)
    )
    run.claim(free, force=False)
    assert config_lib.load_dump(run.config) == config, "not before the checkpoint was read"
    run.keep_config(free)
    assert config_lib.load_dump(run.config) == free


def test_claim_by_another_config(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(tiny_config(run.path), force=False)
    (run.checkpoints / "2").mkdir(parents=True)
    other = tiny_config(run.path, steps=7, optim=OptimConfig(lr=2e-3, warmup_steps=2))
    with pytest.raises(RunFolderError, match=r"(?s)optim.lr: 0.001 -> 0.002\n.*steps: 6 -> 7\n.*--force"):
        run.claim(other, force=False)
    assert config_lib.load_dump(run.config).steps == 6, "refused means unchanged"
    run.claim(other, force=True)


@pytest.mark.parametrize("left", [None, "2.orbax-checkpoint-tmp"])
def test_a_folder_without_a_complete_checkpoint_is_free(tmp_path, left):
    """A first attempt that failed or was killed early leaves nothing that a mended config has to be forced over."""
    run = RunFolder(tmp_path / "run")
    run.claim(tiny_config(run.path), force=False)
    if left:
        (run.checkpoints / left).mkdir(parents=True)
    run.tokenizer.write_text("{}")
    run.classes.write_text("[]")
    other = tiny_config(run.path, seed=5)
    run.claim(other, force=False)
    assert config_lib.load_dump(run.config) == other
    assert not run.tokenizer.exists() and not run.classes.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    run = RunFolder(tmp_path)
    for text in ('{"architectures": ["X"]}', "no json"):
        run.config.write_text(text)
        run.tokenizer.write_text("{}")
        with pytest.raises(RunFolderError, match="config.json of something else"):
            run.claim(tiny_config(run.path), force=True)
        assert run.config.read_text() == text and run.tokenizer.exists()


def test_checkpoints_without_a_config(tmp_path):
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / "2").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="has checkpoints but no config.json"):
        run.claim(tiny_config(run.path), force=False)


def suites():
    source = Source(phantoms=PHANTOMS, split="val")
    return {"zeroshot_phantoms": ZeroShot(source=source, prompts=MODALITY_PROMPTS, by="modality")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fast_compilation):  # noqa: F811
    """A run with an average of its parameters, evaluated every second step; the best checkpoint is an old one."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = tiny_config(
        folder,
        optim=OptimConfig(lr=1e-2, warmup_steps=2, ema_decay=0.5),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    assert train(config) == 0
    return folder


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the run elsewhere."""
    return shutil.copytree(trained, tmp_path / "elsewhere")


def test_loading_needs_nothing_outside_the_folder(trained, moved, monkeypatch, tmp_path):
    expected = load_components(trained)
    hidden = trained.with_name("hidden")
    trained.rename(hidden)
    try:
        monkeypatch.chdir(tmp_path)
        loaded = load_components("elsewhere")
    finally:
        hidden.rename(trained)
    assert loaded.step == 6 and loaded.weights_hash() == expected.weights_hash()
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    np.testing.assert_array_equal(embed_images(loaded, [image]), embed_images(expected, [image]))
    np.testing.assert_array_equal(
        embed_texts(loaded, ["an effusion"]), embed_texts(expected, ["an effusion"])
    )
    np.testing.assert_allclose(np.linalg.norm(embed_images(loaded, [image]), axis=1), 1.0, rtol=1e-5)


def test_which_parameters_are_loaded(trained):
    items = saved_items(trained)
    name = lambda c: np.asarray(c.params["model"]["image_projection"]["kernel"])  # noqa: E731
    wanted = {k: items[k]["model"]["image_projection"]["kernel"] for k in ("params", "ema")}
    assert not np.array_equal(wanted["params"], wanted["ema"])
    np.testing.assert_array_equal(name(load_components(trained)), wanted["ema"])
    np.testing.assert_array_equal(name(load_components(trained, use_ema=False)), wanted["params"])
    assert load_components(trained, checkpoint=4).step == 4
    with pytest.raises(CheckpointError, match=r"no checkpoint 'lates': give latest, best or .* \[4, 6\]"):
        load_components(trained, checkpoint="lates")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; steps are \[4, 6\]"):
        load_components(trained, checkpoint=2)
    with pytest.raises(CheckpointError, match="no checkpoint has the metric checkpoint.best=None"):
        load_components(trained, checkpoint="best")


def test_the_average_is_loaded_as_the_config_says(moved):
    config = config_lib.load_dump(moved / "config.json")
    raw = dataclasses.replace(config, eval=EvalConfig(use_ema=False))
    (moved / "config.json").write_text(config_lib.dump(raw))
    assert load_components(moved).weights_hash() == load_components(moved, use_ema=False).weights_hash()
    assert load_components(moved).weights_hash() != load_components(moved, use_ema=True).weights_hash()


@pytest.mark.parametrize(
    "file, message", [("config.json", "is no run folder: config.json is missing"), ("tokenizer.json", "incomplete: tokenizer.json"),
                      ("preprocess.json", "incomplete: preprocess.json"), ("checkpoints", "has no checkpoint yet")]
)  # fmt: skip
def test_incomplete_folders(moved, file, message):
    shutil.rmtree(moved / file) if (moved / file).is_dir() else (moved / file).unlink()
    with pytest.raises((RunFolderError, CheckpointError), match=message):
        load_components(moved)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(RunFolderError, match="no such folder"):
        load_components(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file, content", [("config.json", '{"model_type": "bert"}'), ("open_clip_config.json", "{}")]
)
def test_a_model_of_another_library_without_its_prefix(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(RunFolderError, match="write open_clip:.* or hf:"):
        load_components(tmp_path)


def other_tokenizer(size):
    texts = (f"word{i} of {i * i}" for i in range(500))
    return Tokenizer.train(texts, TokenizerConfig(vocab_size=size, context_length=16))


@pytest.mark.parametrize("size", [200, 300])
def test_a_tokenizer_of_another_vocabulary(moved, size):
    """Also one of the same size: its ids mean other words."""
    tokenizer = other_tokenizer(size)
    tokenizer.save(moved / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_components(moved)
    with pytest.raises(CheckpointError, match="tokenizer"):
        train(dataclasses.replace(config_lib.load_dump(moved / "config.json"), workdir=str(moved)))


@pytest.mark.parametrize(
    ("text", "tasks", "message"),
    [
        (BertConfig("tiny", max_positions=8), {"contrastive": Contrastive()},
         r"data.tokenizer.context_length=16 is longer .* model.text.max_positions=8"),
        (TextConfig(), {"mlm": MaskedLanguageModel()}, "model.text.causal=False"),
        (BertConfig("tiny"), {"mlm": MaskedLanguageModel()}, r"no mask token; looked for \[MASK\], <mask>"),
    ],
)  # fmt: skip
def test_texts_that_a_tower_or_task_cannot_read(tmp_path, text, tasks, message):
    """Said by `train` before the first step, not by a shape deep inside."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "no"]) + "\n")
    config = tiny_config(tmp_path / "run", tasks=tasks)
    tokenizer = TokenizerConfig(path=str(tmp_path / "vocab.txt"), context_length=16)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text=text),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    )
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_the_best_checkpoint(tmp_path):
    """The one with the best value stays although later ones came, and "best" loads it."""
    config = tiny_config(
        tmp_path / "run",
        steps=4,
        optim=OptimConfig(lr=3e-2, warmup_steps=1),
        eval=EvalConfig(every=1, suites=suites()),
        checkpoint=CheckpointConfig(every=1, keep=1, best="zeroshot_phantoms/accuracy"),
    )
    assert train(config) == 0
    steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    values = {}
    for step in steps:
        file = tmp_path / "run" / "checkpoints" / str(step) / "metrics" / "metrics"
        values[step] = json.loads(file.read_text())["zeroshot_phantoms/accuracy"]
    assert steps[-1] == 4 and len(steps) <= 2
    assert load_components(tmp_path / "run", checkpoint="best").step == max(values, key=values.get)
