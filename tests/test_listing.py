"""The list of runs: states told from made-up run folders, and folders that are none or broken."""

import json
import os

import pytest

from bvl import cli
from bvl.errors import UserError
from bvl.runs import RunFolder
from bvl.train.listing import list_runs, read_run

CONFIG = {"format_version": 1, "steps": 100}


def make_run(path, *, config=CONFIG, saved=(), rows=(), scores=None):
    """A run folder with complete checkpoints of the steps `saved`."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    (path / ".lock").touch()
    if config is not None:
        run.config.write_text(json.dumps(config))
    for step in saved:
        (run.checkpoints / str(step) / "params").mkdir(parents=True)
    if rows:
        run.metrics.write_text("".join(json.dumps({"step": s, "loss/total": 1 / s}) + "\n" for s in rows))
    if scores is not None:
        run.eval.write_text(json.dumps(scores))
    return run


def state(run):
    return read_run(run.path).state


def test_states(tmp_path):
    assert state(make_run(tmp_path / "a", saved=[50, 100], rows=[100])) == "complete"
    assert state(make_run(tmp_path / "b", saved=[50], rows=[60])) == "stopped"
    assert state(make_run(tmp_path / "c")) == "not started"
    assert state(make_run(tmp_path / "d", config=None, saved=[50])) == "damaged"
    assert read_run(make_run(tmp_path / "e", rows=[10]).path).note == "nothing saved"
    failed = make_run(tmp_path / "f", saved=[50], rows=[60])
    (failed.path / "nan_batch.json").write_text('{"step": 61}')
    assert (state(failed), read_run(failed.path).note) == ("failed", "step 61 was bad")
    # It was gone on with.
    (failed.checkpoints / "70").mkdir()
    assert state(failed) == "stopped"


def test_running(tmp_path):
    run = make_run(tmp_path / "a", saved=[100], rows=[100])
    with run.lock():
        info = read_run(run.path)
    assert (info.state, info.note) == ("running", f"process {os.getpid()} on {os.uname().nodename}")
    # What has no holder is not running, and to look takes nothing from who comes next.
    assert state(run) == "complete"
    with run.lock():
        pass


def test_a_lock_that_this_machine_cannot_see(tmp_path):
    run = make_run(tmp_path / "a", saved=[50], rows=[60])
    (run.path / ".lock").write_text("process 7 on node-of-another-name")
    assert "or running, process 7 on node-of-another-name wrote" in read_run(run.path).note
    (run.path / ".lock").write_text(f"process 7 on {os.uname().nodename}")
    assert read_run(run.path).note == ""


def test_values(tmp_path):
    config = CONFIG | {"checkpoint": {"best": "r/b"}}
    run = make_run(tmp_path / "a", config=config, saved=[50], rows=[10, 60], scores={"r/a": 0.1, "r/b": 0.25})
    info = read_run(run.path)
    assert (info.step, info.steps, info.saved, info.loss) == (60, 100, 50, 1 / 60)
    assert (info.metric, info.value) == ("r/b", 0.25)
    assert 0 <= info.age_s < 100
    # Without a metric that the config names, the first number.
    run = make_run(tmp_path / "b", scores={"r/a/ci95": [0, 1], "r/c": 0.5})
    assert read_run(run.path).metric == "r/c"


def test_half_written_last_row(tmp_path):
    run = make_run(tmp_path / "a", rows=[10, 20])
    with open(run.metrics, "a") as file:
        file.write('{"step": 30, "loss/to')
    assert read_run(run.path).step == 20


def test_runs_at_any_depth_and_nothing_else(tmp_path):
    for name in ("a", "sweep/seed=0", "sweep/seed=1"):
        make_run(tmp_path / name, saved=[1])
    # Folders of others, and what lies inside of a run.
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "a/eval").mkdir()
    (tmp_path / "a/eval/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "a/checkpoints/1/params/metrics.jsonl").touch()
    (tmp_path / "to itself").symlink_to(tmp_path)
    names = [os.path.relpath(info.path, tmp_path) for info in list_runs(tmp_path)]
    assert names == ["a", "sweep/seed=0", "sweep/seed=1"]
    assert len(list_runs(tmp_path / "a")) == 1


BROKEN = [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b'{"format_version": 1, "steps": "many", "eval": 3}',
          b'{"format_version": 1, "checkpoint": [], "step": NaN, "steps": true}', b"[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_no_content_of_a_file_is_too_broken(tmp_path, content):
    run = make_run(tmp_path / "a", saved=[5])
    for file in (run.config, run.metrics, run.eval, run.path / "nan_batch.json", run.path / ".lock"):
        file.write_bytes(content)
    (info,) = list_runs(tmp_path)
    assert info.state in ("damaged", "stopped")
    assert info.step == 5


def test_folders_where_files_should_be(tmp_path):
    run = make_run(tmp_path / "a", rows=[5])
    for file in (run.config, run.metrics, run.eval, run.path / ".lock"):
        file.unlink(missing_ok=True)
        file.mkdir()
    run.checkpoints.write_text("no folder")
    assert read_run(run.path).state == "damaged"


def test_command_line(tmp_path, capsys):
    make_run(tmp_path / "a", saved=[100], rows=[100], scores={"r/a": 0.5})
    make_run(tmp_path / "b [red]", config=None, saved=[3])
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "100/100" in out and "r/a 0.5000" in out and "b [red]" in out and "config.json is missing" in out
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["state"], row["step"]) for row in rows] == [("complete", 100), ("damaged", 3)]


def test_wrong_folders(tmp_path, capsys):
    with pytest.raises(UserError, match="no folder"):
        list_runs(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file"):
        list_runs(tmp_path / "file")
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "no run folder in" in capsys.readouterr().out
