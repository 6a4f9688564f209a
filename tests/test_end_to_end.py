"""From a config to embeddings by the commands alone: trained, killed three times, resumed, evaluated, reloaded."""

import json
import shutil

import numpy as np
import pytest
from kill_and_resume import Runner, assert_same_runs
from tiny_run import metric_rows

import bvl


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("end_to_end"))


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


def test_a_complete_run_stays_as_it_is(runner, killed):
    before = (killed / "metrics.jsonl").read_bytes()
    assert runner.run(*runner.train("killed")) == 0
    assert "complete: killed stands at step 60 of 60" in runner.log()
    assert (killed / "metrics.jsonl").read_bytes() == before


def test_evaluate_reload_and_embed(runner, killed, tmp_path):
    """In a folder of its own, from images on disk."""
    moved = shutil.copytree(killed, tmp_path / "run")
    records = tmp_path / "my_phantoms"
    assert runner.run("data", "phantoms", records, "--n", 24, "--size", 32) == 0, runner.log()
    assert runner.run("eval", moved, "--data", records, "--name", "mine") == 0, runner.log()
    result = json.loads((moved / "eval" / "mine.json").read_text())
    assert any(key.endswith("/t2i_r1") for key in result)
    out = tmp_path / "images.npz"
    assert runner.run("embed", moved, records, "--out", out) == 0, runner.log()
    with np.load(out) as file:
        assert file["image_embed"].shape == (24, 16)
        embedded = dict(zip(file["ids"].tolist(), file["image_embed"], strict=True))
    lines = [json.loads(line) for line in (records / "records.jsonl").read_text().splitlines()]
    model = bvl.load(moved)
    images = model.embed_images([records / line["image"] for line in lines[:4]])
    for line, image in zip(lines[:4], images, strict=True):
        np.testing.assert_allclose(embedded[line["id"]], image, rtol=1e-5, atol=1e-6)
