"""The loop: what stops it, what it saves then, where it starts, and what it writes."""

import dataclasses
import errno
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from kill_and_resume import assert_same_runs
from PIL import Image
from tasks_for_tests import Centre
from tiny_run import (
    PHANTOMS,
    assert_same_trees,
    fast_compilation,  # noqa: F401
    metric_rows,
    saved_items,
    tiny_config,
    traced_once,  # noqa: F401
)

import bvl
from bvl.config import CheckpointConfig, EvalConfig, LogConfig, SurviveConfig
from bvl.data.phantoms import MODALITY_PROMPTS
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import CheckpointError, ConfigError, DataError, RunFolderError
from bvl.evals.zeroshot import ZeroShot
from bvl.models.grid import resize_positions
from bvl.runs import RunFolder, load_components, write_atomic
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.train.bad_records import BadRecords
from bvl.train.bad_steps import TrainingFailed
from bvl.train.environment import describe_environment
from bvl.train.loop import _add, _means, train
from bvl.train.metrics_log import JsonLines
from bvl.train.optim import OptimConfig
from bvl.train.plan import OutOfMemory

pytestmark = pytest.mark.usefixtures("fast_compilation", "traced_once")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, fast_compilation):  # noqa: F811
    """Six steps, checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("loop") / "first"
    assert train(tiny_config(folder)) == 0
    return folder


def test_rows_of_the_metrics(first_run):
    rows = metric_rows(first_run)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"loss/total", "loss/contrastive", "grad_norm", "lr", "contrastive/scale"} <= rows[0].keys()
    assert rows[0]["contrastive/pairs"] == 8.0
    groups = ("image", "text", "projections", "logits")
    norms = {f"{kind}_norm/{group}" for kind in ("grad", "update", "param") for group in groups}
    assert norms <= rows[0].keys()
    whole = np.sqrt(sum(rows[-1][f"grad_norm/{group}"] ** 2 for group in groups))
    # Means over two steps: the norm of the means differs a little from the mean of the norms.
    np.testing.assert_allclose(whole, rows[-1]["grad_norm"], rtol=0.05)
    rows = list(map(json.loads, (first_run / "metrics.jsonl").read_text().splitlines()))
    assert all(row["time/examples_per_s"] > 0 and 0 <= row["time/data_wait_share"] <= 1 for row in rows)
    assert rows[0]["time/compile_s"] > 0 and rows[0]["time/host_memory_gb"] > 0.01
    flops = [row["time/flops_per_s"] * row["time/step_s"] for row in rows]
    # The towers' matrix products, three times for forward and backward, on 8 images of 4 patches and 8 texts of 16.
    products = 2 * 12 * 32**2 * 8 * (4 + 16) * 3
    assert flops == pytest.approx(3 * flops[:1]) and products < flops[0] < 1.5 * products
    assert not any("time/peak_share" in row for row in rows)


def test_the_share_of_a_stated_peak(tmp_path):
    log = LogConfig(every=0, tensorboard=False, peak_flops=1e9)
    assert train(tiny_config(tmp_path / "run", log=log)) == 0
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["time/peak_share"] == pytest.approx(row["time/flops_per_s"] / 1e9)


def test_norms_can_be_left_out_of_a_resumed_run(tmp_path):
    """Between two rows too: the row then holds the means of the steps that had them."""
    config = tiny_config(tmp_path / "run", steps=4)
    with stopped_at(3):
        assert train(config) == 130
    assert train(dataclasses.replace(config, log=LogConfig(every=2, tensorboard=False, norms=False))) == 0
    first, second = metric_rows(tmp_path / "run")
    assert first.keys() == second.keys()
    assert (
        train(dataclasses.replace(tiny_config(tmp_path / "none", steps=4), log=LogConfig(norms=False))) == 0
    )
    assert not [key for key in metric_rows(tmp_path / "none")[0] if "_norm/" in key]


def test_every_0_means_only_at_the_end(first_run, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        log=LogConfig(every=0, tensorboard=True),
        checkpoint=CheckpointConfig(every=0),
    )
    assert train(config) == 0
    (row,) = metric_rows(tmp_path / "run")
    several = metric_rows(first_run)
    np.testing.assert_allclose(row["loss/total"], np.mean([r["loss/total"] for r in several]), rtol=1e-5)
    assert row["step"] == 6 and [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert_same_trees(saved_items(tmp_path / "run")["params"], saved_items(first_run)["params"])


def test_a_complete_run_says_so(first_run, caplog, monkeypatch):
    monkeypatch.setattr("bvl.train.loop._Loop.run_to_end", lambda *_: pytest.fail("it trained on"))
    with caplog.at_level("INFO", "bvl"):
        assert train(tiny_config(first_run)) == 0
    assert f"complete: {first_run} stands at step 6 of 6" in caplog.text


def test_the_environment_of_a_start(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    told = describe_environment({"phantoms": {"CC0": 3}})
    assert told["xla_flags"] == "--xla_gpu_deterministic_ops=true" and told["packages"]["jax"]
    assert told["licences"] == {"phantoms": {"CC0": 3}}


def test_another_config_is_refused_and_forced(first_run, tmp_path):
    with pytest.raises(RunFolderError, match="(?s)steps: 6 -> 8.*--force"):
        train(tiny_config(first_run, steps=8))


def test_no_workdir():
    with pytest.raises(ConfigError, match="workdir=DIR"):
        train(tiny_config())


def test_a_loss_that_is_no_number(tmp_path):
    """The run stops, the records of the batch are named, and no spoiled checkpoint is kept."""
    config = tiny_config(
        tmp_path / "run",
        optim=OptimConfig(name="sgd", lr=1e30, schedule="constant", warmup_steps=0, clip_norm=None),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False),
    )
    with pytest.raises(
        TrainingFailed, match=r"of step 2 is not a finite number.*nan_batch.json.*lower optim.lr"
    ):
        train(config)
    saved = json.loads((tmp_path / "run" / "nan_batch.json").read_text())
    assert saved["step"] == 2 and saved["seed"] == 0
    assert len(saved["records"]) == 8
    assert all(r["source"] == "phantoms" and r["id"].startswith("phantom-") for r in saved["records"])
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_two_tasks_and_state_of_a_third(tmp_path):
    """Nothing in the loop knows them; their heads and extra state are in the checkpoint, also after a resume."""
    tasks = {"pairs": Contrastive(), "labels": Classify(multi_label=True), "centre": Centre(noise=0.1)}
    for name in ("whole", "parts"):
        config = tiny_config(tmp_path / name, tasks=tasks, steps=4)
        if name == "parts":
            with stopped_at(2):
                assert train(config) == 130
        assert train(config) == 0
    items = saved_items(tmp_path / "whole")
    assert set(items["params"]["heads"]) == {"labels", "centre"}
    assert int(items["rest"]["extra"]["centre"]["updates"]) == 4
    assert {"loss/pairs", "loss/labels", "loss/centre", "labels/accuracy"} <= metric_rows(tmp_path / "whole")[
        0
    ].keys()
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class Bad(Centre):
    """No number in some steps."""

    bad: tuple[int, ...] = ()

    def loss(self, ctx):
        output = super().loss(ctx)
        wrong = (ctx.step[None] + 1 == jnp.asarray(self.bad)).any()
        return dataclasses.replace(output, loss=jnp.where(wrong, jnp.nan, output.loss))


def test_bad_steps_are_skipped(tmp_path, caplog):
    """Nothing but the step counter moves; the row counts them, and a resume between two goes on alike."""
    tasks = {"contrastive": Contrastive(), "centre": Bad(noise=0.1, bad=(3, 4))}
    config = tiny_config(
        tmp_path / "whole",
        tasks=tasks,
        optim=OptimConfig(lr=1e-3, warmup_steps=2, ema_decay=0.9),
        checkpoint=CheckpointConfig(every=1, keep=9),
        survive=SurviveConfig(bad_steps="skip", max_skipped=2),
    )
    assert train(config) == 0
    assert "the loss of step 4 is not a finite number; the step is skipped (2 in a row)" in caplog.text
    before, after, end = (saved_items(tmp_path / "whole", step) for step in (2, 4, 6))
    assert int(before["rest"].pop("step")) == 2 and int(after["rest"].pop("step")) == 4
    for item in ("params", "ema", "rest"):
        assert_same_trees(after[item], before[item])
    assert int(end["rest"]["extra"]["centre"]["updates"]) == 4
    rows = metric_rows(tmp_path / "whole")
    assert [row["skipped"] for row in rows] == [0.0, 2.0, 0.0]
    assert rows[1]["loss/total"] is None and rows[2]["loss/total"] > 0
    for step in (3, 4):
        saved = json.loads((tmp_path / "whole" / "bad_batches" / f"{step}.json").read_text())
        assert saved["step"] == step and len(saved["records"]) == 8
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    with stopped_at(3):
        assert train(parts) == 130
    assert train(parts) == 0
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    # It may be switched off and on again, and one more in a row is too many.
    fewer = dataclasses.replace(config, survive=SurviveConfig(bad_steps="skip", max_skipped=1))
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(TrainingFailed, match=r"step 4.*number 2 in a row.*max_skipped=1.*nan_batch.json"):
        train(dataclasses.replace(fewer, workdir=str(tmp_path / "parts")))


def test_a_guard_that_is_switched_on_later(first_run, tmp_path):
    """What there is no saved state of begins anew, and another start may do without."""
    without = tiny_config(tmp_path / "run")
    guarded = dataclasses.replace(without, survive=SurviveConfig(spike_factor=10.0))
    for config, step in ((without, 2), (guarded, 4)):
        with stopped_at(step):
            assert train(config) == 130
    assert int(saved_items(tmp_path / "run")["guard"]["good"]) == 2
    assert train(without) == 0
    assert_same_trees(saved_items(tmp_path / "run"), saved_items(first_run))
    rows = metric_rows(tmp_path / "run")
    assert [row.pop("skipped", None) for row in rows] == [None, 0.0, None]
    assert rows == metric_rows(first_run)


class stopped_at:
    """Ctrl-C arrives while step `step` is under way."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        from bvl.train.metrics_log import ProgressLines

        self.patch = pytest.MonkeyPatch()
        advance = ProgressLines.advance

        def then_interrupt(progress, step):
            advance(progress, step)
            if step == self.step:
                os.kill(os.getpid(), signal.SIGINT)

        self.patch.setattr(ProgressLines, "advance", then_interrupt)

    def __exit__(self, *_):
        self.patch.undo()


def test_interrupted_between_rows_and_checkpoints(tmp_path, first_run):
    """Metric sums that were not logged yet are in the checkpoint, and the row after the resume has the same means."""
    config = tiny_config(tmp_path / "run")
    with stopped_at(3):
        assert train(config) == 130
    assert "sums" in saved_items(tmp_path / "run", 3)
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [2]
    # Rows of a later step than the checkpoint, and a half-written one, as kill -9 leaves them.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss/total": 99.0}\n{"step": 5, "lo')
    assert train(config) == 0
    assert_same_runs(tmp_path / "run", first_run)


def folder_of_images(root, *, broken, count=40):
    """`count` records, of which the first `broken` are truncated JPEGs."""
    root.mkdir()
    rng = np.random.default_rng(0)
    with open(root / "records.jsonl", "w") as file:
        for i in range(count):
            name = f"{i}.jpg"
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root / name)
            if i < broken:
                (root / name).write_bytes((root / name).read_bytes()[:300])
            row = {"id": f"r{i}", "image": name, "caption": f"picture number {i} of many", "split": "train"}
            file.write(json.dumps(row) + "\n")
    return root


def data_of(root, **changes):
    data = DataConfig(
        train=(Source(root=str(root)),),
        preprocess=Preprocess(image_size=32),
        tokenizer=TokenizerConfig(vocab_size=300, context_length=16),
    )
    return dataclasses.replace(data, **changes)


@pytest.mark.parametrize("workers", [0])
def test_unreadable_records_are_named_once(tmp_path, workers):
    """Others take their place; across epochs and a resume each is listed once."""
    root = folder_of_images(tmp_path / "images", broken=3)
    config = tiny_config(
        tmp_path / "run", steps=12, data=data_of(root, max_bad_fraction=0.1, workers=workers)
    )
    with stopped_at(7):
        assert train(config) == 130
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["r0", "r1", "r2"]
    assert all(row["source"] == "images" and row["step"] <= 12 and row["error"] for row in rows)


def test_too_many_unreadable_records(tmp_path):
    root = folder_of_images(tmp_path / "images", broken=10)
    config = tiny_config(tmp_path / "run", steps=12, data=data_of(root, max_bad_fraction=0.05))
    with pytest.raises(
        DataError,
        match=r"3 of 40 records cannot be read, more than data.max_bad_fraction=0.05.*bad_records.jsonl",
    ):
        train(config)
    assert len((tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()) == 3


def test_no_readable_record(tmp_path):
    root = folder_of_images(tmp_path / "images", broken=12, count=12)
    with pytest.raises(DataError, match="records in a row could not be read"):
        train(tiny_config(tmp_path / "run", data=data_of(root, max_bad_fraction=1.0)))


def test_init_from(first_run, tmp_path):
    """The parameters are those of the other run, the step is 0 and the optimiser is fresh."""
    frozen = OptimConfig(name="sgd", lr=1e-30, warmup_steps=0, freeze=("^(?!model/log_scale)",))
    config = tiny_config(tmp_path / "run", steps=1, init_from=str(first_run), optim=frozen, seed=3)
    assert train(config) == 0
    there, here = saved_items(first_run), saved_items(tmp_path / "run")
    assert_same_trees(here["params"]["model"], there["params"]["model"])
    assert int(here["rest"]["step"]) == 1
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (first_run / "tokenizer.json").read_text()
    # Its own checkpoint wins over init_from.
    assert train(dataclasses.replace(config, init_from=str(first_run))) == 0


def test_init_from_another_model(first_run, tmp_path):
    config = tiny_config(tmp_path / "run", init_from=str(first_run))
    model = dataclasses.replace(config.model, embed_dim=24)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)init_from=.*2 arrays differ.*image_projection/kernel: there \(32, 16\), here \(32, 24\)",
    ):
        train(dataclasses.replace(config, model=model))


def test_resume_from(first_run, tmp_path):
    """Everything of the other run, step included, in a folder of its own; the other one is only read."""
    before = sorted(p.name for p in (first_run / "checkpoints").iterdir())
    longer = dict(steps=8, optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="constant"))
    config = tiny_config(tmp_path / "run", resume_from=str(first_run), **longer)
    assert train(config) == 0
    items = saved_items(tmp_path / "run")
    assert int(items["rest"]["step"]) == 8
    assert [row["step"] for row in metric_rows(tmp_path / "run")] == [8]
    assert sorted(p.name for p in (first_run / "checkpoints").iterdir()) == before
    with pytest.raises(ConfigError, match="stands at step 6: steps=6 leaves nothing to train"):
        train(tiny_config(tmp_path / "other", resume_from=str(first_run)))
    with pytest.raises(CheckpointError, match="resume_from=.*nowhere"):
        train(tiny_config(tmp_path / "third", resume_from=str(tmp_path / "nowhere"), steps=8))


def test_a_frozen_teacher_from_a_run(first_run, tmp_path):
    """Named in the config; not saved again."""
    config = tiny_config(
        tmp_path / "run", steps=3, frozen={"teacher": str(first_run)},
        tasks={"contrastive": Contrastive(), "centre": Centre(teacher="teacher")},
    )  # fmt: skip
    assert train(config) == 0
    assert set(saved_items(tmp_path / "run")["params"]) == {"model", "heads"}


@pytest.mark.parametrize("max_failures", [1, 2])
def test_a_full_disk_while_saving(first_run, tmp_path, monkeypatch, caplog, max_failures):
    """Training goes on, up to so many failures; then what was saved before stays, and the same command goes on."""
    config = tiny_config(
        tmp_path / "run", checkpoint=CheckpointConfig(every=2, keep=2, max_failures=max_failures)
    )
    finalize = ocp.PyTreeCheckpointHandler.finalize

    def full(self, directory):
        if "4" in str(directory.parent.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return finalize(self, directory)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
    if max_failures == 1:
        with pytest.raises(CheckpointError, match="step 4 could not be saved.*goes on from step 2"):
            train(config)
        monkeypatch.undo()
    assert train(config) == 0
    assert ("NOT SAVED: the checkpoint of step 4" in caplog.text) == (max_failures == 2)
    assert_same_runs(tmp_path / "run", first_run)


def test_a_full_disk_while_metrics_are_written(first_run, tmp_path, monkeypatch):
    """Rows wait, and no checkpoint is saved without them; after too many the run stops."""
    config = tiny_config(tmp_path / "run")
    monkeypatch.setattr("bvl.train.saving.PAUSE_S", 0.0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bvl.train.metrics_log.JsonLines.flush", full)
    with pytest.raises(RunFolderError, match="cannot be written.*No space left.*run the same command again"):
        train(config)
    monkeypatch.undo()
    assert train(config) == 0
    assert_same_runs(tmp_path / "run", first_run)


def test_rows_of_unreadable_records_hold_back_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("bvl.train.saving.PAUSE_S", 0.0)
    flush = JsonLines.flush

    def full(rows):
        if rows._path.name == "bad_records.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(rows)

    monkeypatch.setattr(JsonLines, "flush", full)
    root = folder_of_images(tmp_path / "images", broken=3, count=8)
    with pytest.raises(RunFolderError, match="cannot be written.*No space left"):
        train(tiny_config(tmp_path / "run", data=data_of(root, max_bad_fraction=0.9)))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_best_must_name_a_suite(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.best='acc' is no metric of an evaluation suite"):
        train(tiny_config(tmp_path / "run", checkpoint=CheckpointConfig(best="acc")))


def test_images_and_labels_without_any_text(tmp_path):
    """Tasks that read no text need none; the folder still has all that loading it needs."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    with open(root / "records.jsonl", "w") as file:
        for i in range(16):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root / f"{i}.png")
            row = {"id": f"r{i}", "image": f"{i}.png", "labels": ["ab"[i % 2]], "split": "train"}
            file.write(json.dumps(row) + "\n")
    config = tiny_config(tmp_path / "run", steps=3, data=data_of(root), tasks={"classify": Classify()})
    assert train(config) == 0
    components = load_components(tmp_path / "run")
    assert components.classes == ("a", "b") and components.tokenizer.vocab_size == 4
    with pytest.raises(DataError, match="text"):
        train(tiny_config(tmp_path / "other", steps=3, data=data_of(root)))


def test_a_forced_model_that_does_not_fit_leaves_the_folder_whole(first_run, tmp_path):
    run = shutil.copytree(first_run, tmp_path / "run")
    before = {name: (run / name).read_text() for name in ("config.json", "preprocess.json", "env.json")}
    config = tiny_config(run, steps=8)
    wider = dataclasses.replace(config.model, embed_dim=24)
    data = dataclasses.replace(config.data, preprocess=Preprocess(image_size=32, mean=(0.1, 0.2, 0.3)))
    with pytest.raises(CheckpointError, match="arrays differ"):
        train(dataclasses.replace(config, model=wider, data=data), force=True)
    assert {name: (run / name).read_text() for name in before} == before
    assert load_components(run).step == 6
    assert train(config, force=True) == 0
    starts = json.loads((run / "env.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 6] and starts[0] == json.loads(before["env.json"])[
        0
    ]


def test_started_again_before_the_first_checkpoint(first_run, tmp_path):
    """What a killed start left is made again and the end is the same."""
    config = tiny_config(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in ("tokenizer.json", "classes.json", "config.json", "metrics.jsonl"):
        shutil.copy(first_run / name, tmp_path / "run" / name)
    assert train(config) == 0
    assert_same_runs(tmp_path / "run", first_run)


def test_resumes_although_init_from_is_gone(first_run, tmp_path):
    other = shutil.copytree(first_run, tmp_path / "other")
    config = tiny_config(tmp_path / "run", steps=4, init_from=str(other), seed=3)
    with stopped_at(2):
        assert train(config) == 130
    shutil.rmtree(other)
    assert train(config) == 0
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (first_run / "tokenizer.json").read_text()


def evaluated(workdir, **checkpoint):
    suite = ZeroShot(source=Source(phantoms=PHANTOMS, split="val"), prompts=MODALITY_PROMPTS, by="modality")
    return tiny_config(
        workdir, eval=EvalConfig(every=2, suites={"zero": suite}), checkpoint=CheckpointConfig(**checkpoint)
    )


def test_every_evaluation_stands_in_a_row(tmp_path):
    """Beside the losses of its step, and the same after a resume."""
    for name in ("whole", "parts"):
        config = evaluated(tmp_path / name, every=3)
        if name == "parts":
            with stopped_at(4):
                assert train(config) == 130
        assert train(config) == 0
    rows = metric_rows(tmp_path / "whole")
    assert [row["step"] for row in rows] == [2, 4, 6]
    final = json.loads((tmp_path / "whole" / "eval.json").read_text())
    assert rows[-1]["eval/zero/accuracy"] == final["zero/accuracy"] and "loss/total" in rows[-1]
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("failures", [1, 9])
def test_a_full_disk_at_the_last_evaluation(tmp_path, monkeypatch, caplog, failures):
    """The last checkpoint is saved all the same; then the files are tried once more."""
    left = [failures]

    def full(path, text):
        if path.name == "eval.json" and json.loads(text)["zero/provenance"]["step"] == 6 and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, text)

    monkeypatch.setattr("bvl.evals.base.write_atomic", full)
    config = evaluated(tmp_path / "run", every=0)
    if failures == 1:
        assert train(config) == 0
    else:
        with pytest.raises(
            RunFolderError, match="complete and saved, but .*eval.json.*No space left.*bvl eval"
        ):
            train(config)
    assert "NOT WRITTEN" in caplog.text
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    assert metric_rows(tmp_path / "run")[-1]["eval/zero/accuracy"] is not None
    there = json.loads((tmp_path / "run" / "eval.json").read_text())["zero/provenance"]["step"]
    assert there == (6 if failures == 1 else 4)
    assert train(config) == 0


def test_a_run_stops_early(tmp_path, caplog):
    """With the evaluation and the checkpoint of its end, in the same place after a resume, and for good."""
    best = dict(every=3, best="zero/accuracy")
    for name in ("whole", "parts"):
        # No improvement is large enough: the second and the third evaluation end it.
        config = evaluated(tmp_path / name, **best)
        stop = dict(stop_metric="zero/accuracy", stop_patience=2, stop_min_delta=1.0)
        config = dataclasses.replace(config, steps=20, eval=dataclasses.replace(config.eval, **stop))
        if name == "parts":
            with stopped_at(5):
                assert train(config) == 130
        with caplog.at_level("INFO", "bvl"):
            assert train(config) == 0
        assert "stopped early at step 6 of 20: zero/accuracy was best at step 2" in caplog.text
        caplog.clear()
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    rows = metric_rows(tmp_path / "whole")
    assert [row["step"] for row in rows] == [2, 4, 6]
    final = json.loads((tmp_path / "whole" / "eval.json").read_text())
    assert rows[-1]["eval/zero/accuracy"] == final["zero/accuracy"]
    assert load_components(tmp_path / "whole", checkpoint="best").step in (2, 4, 6)
    with caplog.at_level("INFO", "bvl"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("bvl.train.loop._Loop.run_to_end", lambda *_: pytest.fail("it trained on"))
        assert train(config) == 0
    assert "stands at step 6 of 20" in caplog.text and "stopped early: zero/accuracy" in caplog.text
    # More patience, and it goes on.
    patient = dataclasses.replace(config, eval=dataclasses.replace(config.eval, stop_patience=3))
    assert train(patient) == 0
    assert metric_rows(tmp_path / "parts")[-1]["step"] == 8


def test_stop_metric_must_exist(tmp_path):
    config = evaluated(tmp_path / "run", every=0)
    for metric, error in (
        ("acc", "eval.stop_metric='acc' is no metric of an evaluation suite; suites are: zero"),
        ("zero/acuracy", "stop_metric='zero/acuracy' is no metric.*step 2; nearest is 'zero/accuracy'"),
    ):
        wrong = dataclasses.replace(config, eval=dataclasses.replace(config.eval, stop_metric=metric))
        with pytest.raises(ConfigError, match=error):
            train(wrong)
    rare = dataclasses.replace(config.eval, stop_metric="zero/accuracy", every=0)
    with pytest.raises(ConfigError, match="needs evaluations during training: set eval.every"):
        train(dataclasses.replace(config, eval=rare))


def test_the_average_is_what_is_evaluated_and_loaded(tmp_path):
    """By the suites, as the best checkpoint and by bvl.load; with use_ema=false it is the parameters themselves."""
    optim = OptimConfig(lr=3e-3, warmup_steps=2, ema_decay=0.9)
    seen = {}
    for use_ema in (True, False):
        run = tmp_path / str(use_ema)
        config = dataclasses.replace(evaluated(run, every=0, best="zero/accuracy"), optim=optim)
        assert train(dataclasses.replace(config, eval=dataclasses.replace(config.eval, use_ema=use_ema))) == 0
        loaded = load_components(run, checkpoint="best")
        items = saved_items(run, loaded.step)
        assert_same_trees(jax.tree.map(np.asarray, loaded.params), items["ema" if use_ema else "params"])
        final = bvl.load(run).components
        provenance = json.loads((run / "eval.json").read_text())["zero/provenance"]
        assert provenance["weights_hash"] == final.weights_hash() and provenance["step"] == final.step == 6
        seen[use_ema] = final.weights_hash(), saved_items(run)
    assert seen[True][0] != seen[False][0]
    assert_same_trees(seen[True][1], seen[False][1])


def test_best_is_misspelt(tmp_path):
    with pytest.raises(
        ConfigError, match="best='zero/acuracy' is no metric.*step 2; nearest is 'zero/accuracy'"
    ):
        train(evaluated(tmp_path / "run", every=0, best="zero/acuracy"))
    assert train(evaluated(tmp_path / "run", every=0, best="zero/accuracy")) == 0
    assert metric_rows(tmp_path / "run")[-1]["step"] == 6


def test_parameters_that_are_no_numbers_are_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr("bvl.train.loop.evaluate_state", lambda *_, **__: pytest.fail("evaluated"))
    optim = OptimConfig(name="sgd", lr=1e30, schedule="constant", warmup_steps=0, clip_norm=None)
    config = dataclasses.replace(evaluated(tmp_path / "run"), optim=optim, log=LogConfig(every=0))
    with pytest.raises(TrainingFailed):
        train(config)


def traces(run):
    return list((run / "profile").rglob("*.xplane.pb"))


def test_a_trace_of_some_steps(tmp_path, first_run, caplog):
    """Also where a start goes on in their midst; it changes nothing but the folder."""
    config = tiny_config(tmp_path / "run", log=LogConfig(every=2, tensorboard=False, profile="3:4"))
    with stopped_at(3):
        assert train(config) == 130
    assert len(traces(tmp_path / "run")) == 1
    shutil.rmtree(tmp_path / "run" / "profile")
    assert train(config) == 0
    assert len(traces(tmp_path / "run")) == 1
    assert_same_runs(tmp_path / "run", first_run)


def test_a_trace_of_steps_that_do_not_come(tmp_path, caplog):
    config = tiny_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="log.profile=5:7 goes beyond the last step, steps=6"):
        train(dataclasses.replace(config, log=LogConfig(profile="5:7")))
    with stopped_at(2):
        assert train(config) == 130
    assert train(dataclasses.replace(config, log=LogConfig(tensorboard=False, profile="1:2"))) == 0
    assert "log.profile=1:2: training goes on after step 2" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()


def test_sums_of_a_start_that_logged_other_names():
    earlier = {"step": {"loss": np.float32([3, 1]), "old": np.float32([1, 1])}, "tasks": {}}
    later = {
        "step": {"loss": np.float32([5, 1]), "new": np.float32([4, 2])},
        "tasks": {"a": {"x": np.ones(2)}},
    }
    assert _means(_add(earlier, later)) == {"loss/total": 4.0, "old": 1.0, "new": 2.0, "a/x": 1.0}


def test_out_of_memory_shows_the_plan(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore")

    monkeypatch.setattr("bvl.train.loop._Loop.run_to_end", full)
    with pytest.raises(
        OutOfMemory, match=r"(?s)out of memory: RESOURCE_EXHAUSTED.*1 bytes\.\n\n.*parameters"
    ):
        train(tiny_config(tmp_path / "run"))


def test_sigmoid_needs_a_bias(tmp_path):
    config = tiny_config(tmp_path / "run", tasks={"pairs": Contrastive(loss_type="sigmoid")})
    with pytest.raises(ConfigError, match="model.init_bias=-10 model.init_temperature=0.1"):
        train(config)


def test_one_unreadable_record_is_always_allowed(tmp_path):
    bad = {"source": "s", "error": "broken"}
    records = BadRecords(RunFolder(tmp_path), num_records=20, max_fraction=0.01, resume_step=0)
    records.add(1, [{"id": "a", **bad}])
    with pytest.raises(DataError, match="2 of 20"):
        records.add(2, [{"id": "b", **bad}])
    records.close()


def test_init_from_at_another_image_size(first_run, tmp_path):
    """The positions are resampled, everything else is the same."""
    frozen = OptimConfig(name="sgd", lr=1e-30, warmup_steps=0, freeze=("^(?!model/log_scale)",))
    config = tiny_config(tmp_path / "run", steps=1, init_from=str(first_run), optim=frozen)
    data = dataclasses.replace(config.data, preprocess=Preprocess(image_size=48))
    assert train(dataclasses.replace(config, data=data)) == 0
    there, here = (saved_items(run)["params"]["model"] for run in (first_run, tmp_path / "run"))
    old, new = there["image"].pop("positions"), here["image"].pop("positions")
    np.testing.assert_allclose(new, resize_positions(old, (2, 2), (3, 3)), atol=1e-6)
    assert_same_trees(here, there)
