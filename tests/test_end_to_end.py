"""From a config to embeddings by the commands alone: trained, killed three times, resumed, evaluated, reloaded."""

import json
import shutil
import signal

import numpy as np
import pytest
from kill_and_resume import Runner, assert_same_runs
from tiny_run import compiled_programs, fast_compilation, metric_rows  # noqa: F401

import bvl
from bvl import cli

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(autouse=True)
def logging_as_it_is(monkeypatch):
    """Else `cli.main` keeps messages from caplog for good."""
    monkeypatch.setattr("bvl.train.metrics_log.set_up_logging", lambda: None)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("end_to_end"), compiled=compiled_programs(tmp_path_factory))


@pytest.fixture(scope="module")
def uninterrupted(runner):
    assert runner.run(*runner.train("whole")) == 0, runner.log()
    return runner.folder / "whole"


@pytest.fixture(scope="module")
def killed(runner, uninterrupted):
    """Killed before its first checkpoint, between two, and while one is being written; then left to its end."""
    name = "killed"
    assert runner.kill_when(name, lambda: runner.rows(name) >= 1), runner.log()
    assert runner.kill_when(name, lambda: runner.rows(name) >= 4, delay=0.002), runner.log()
    begun = len(runner.steps(name))
    assert begun >= 1, "the second kill came after a checkpoint"
    assert runner.kill_when(name, lambda: runner.saving(name)), runner.log()
    assert runner.run(*runner.train(name)) == 0, runner.log()
    return runner.folder / name


def test_killed_runs_end_as_if_uninterrupted(runner, uninterrupted, killed):
    assert runner.log().count("resuming from step") >= 2
    assert [row["step"] for row in metric_rows(killed)] == list(range(5, 61, 5))
    assert_same_runs(killed, uninterrupted)


def test_signals_save_and_stop(runner, uninterrupted):
    """Stopped by one signal, then by the other, the same command goes on; the end is that of an uninterrupted run."""
    name = "signalled"
    for number, code, rows in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 5)):
        process = runner.popen(*runner.train(name))
        try:
            assert runner.wait_for(lambda rows=rows: runner.rows(name) >= rows, process), runner.log()
            process.send_signal(number)
            assert process.wait(60) == code, runner.log()
        finally:
            process.kill()
            process.wait()
        step = runner.steps(name)[-1]
        assert runner.log().count(f"stopped at step {step} of 60") == 1
    assert runner.run(*runner.train(name)) == 0, runner.log()
    assert_same_runs(runner.folder / name, uninterrupted)


def command(*words) -> int:
    """The exit code of `bvl WORDS`, without the start of another process."""
    return cli.main([str(word) for word in words])


def test_a_complete_run_stays_as_it_is(runner, killed, monkeypatch, caplog):
    before = (killed / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(runner.folder)
    with caplog.at_level("INFO", "bvl"):
        assert command(*runner.train("killed")) == 0
    assert "complete: killed stands at step 60 of 60" in caplog.text
    assert (killed / "metrics.jsonl").read_bytes() == before


def test_evaluate_reload_and_embed(killed, tmp_path):
    """In a folder of its own, from images on disk."""
    moved = shutil.copytree(killed, tmp_path / "run")
    records = tmp_path / "my_phantoms"
    assert command("data", "phantoms", records, "--n", 24, "--size", 32) == 0
    assert command("eval", moved, "--data", records, "--name", "mine") == 0
    result = json.loads((moved / "eval" / "mine.json").read_text())
    assert any(key.endswith("/t2i_r1") for key in result)
    out = tmp_path / "images.npz"
    assert command("embed", moved, records, "--out", out) == 0
    with np.load(out) as file:
        assert file["image_embed"].shape == (24, 16)
        embedded = dict(zip(file["ids"].tolist(), file["image_embed"], strict=True))
    lines = [json.loads(line) for line in (records / "records.jsonl").read_text().splitlines()]
    model = bvl.load(moved)
    images = model.embed_images([records / line["image"] for line in lines[:4]])
    for line, image in zip(lines[:4], images, strict=True):
        np.testing.assert_allclose(embedded[line["id"]], image, rtol=1e-5, atol=1e-6)
