"""Requests to stop, saves that fail, and bad steps, each on its own; test_loop.py has them together."""

import errno
import json
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl import hosts
from bvl.config import SurviveConfig
from bvl.errors import CheckpointError, ConfigError
from bvl.runs import RunFolder
from bvl.train.bad_steps import StepReader, TrainingFailed
from bvl.train.guard import FIRST, Guard
from bvl.train.metrics_log import JsonLines, MetricsLog
from bvl.train.saving import Saver
from bvl.train.survive import STOP, exit_on_signals, stop_on_signals
from bvl.train.tensorboard import TensorBoard


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
def test_a_signal_asks_to_stop(name, code):
    before = signal.getsignal(signal.Signals[name])
    with stop_on_signals() as request:
        assert request.exit_code is None and request.agreed(0) is None
        os.kill(os.getpid(), signal.Signals[name])
        assert request.agreed(0) == code
    assert signal.getsignal(signal.Signals[name]) == before


def test_signals_that_follow_each_other():
    """SIGTERM after SIGUSR1 waits for the save too; only Ctrl-C is impatient."""
    with stop_on_signals() as request:
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[name])
        assert request.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)


def test_before_training_a_signal_ends_the_process():
    with exit_on_signals(), pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1.0)
    assert stopped.value.code == 143


def test_several_hosts_stop_at_what_all_have_read(monkeypatch):
    with stop_on_signals() as request:
        batch = {"image": np.zeros((3, 2))}
        assert request.in_batch(batch) is batch
        monkeypatch.setattr(hosts, "count", lambda: 2)
        os.kill(os.getpid(), signal.SIGTERM)
        np.testing.assert_array_equal(request.in_batch(batch)[STOP], [143] * 3)
        assert request.agreed(0) is None and request.agreed(130) == 130


class FakeCheckpoints:
    """Saves that fail as told: "start", "background" or None for each."""

    def __init__(self, *plan):
        self.plan, self.saved, self.pending = list(plan), [], None

    def save(self, step, items, scores):
        self.pending = (self.plan.pop(0), step)
        if self.pending[0] == "start":
            raise CheckpointError(f"step {step}")

    def wait(self):
        how, step = self.pending or ("start", 0)
        self.pending = None
        if how == "background":
            raise CheckpointError(f"step {step}")
        if how is None:
            self.saved.append(step)

    def check(self):
        self.wait()
        return True


def test_failed_saves_in_a_row(caplog):
    checkpoints = FakeCheckpoints("start", "background", None, "background", "start", "background")
    saver = Saver(checkpoints, max_failures=3, flush=lambda: None)
    assert not saver.save(1, {})
    assert saver.save(2, {})
    saver.check()
    assert "NOT SAVED: step 2" in caplog.text and "Failure 2 in a row" in caplog.text
    assert saver.save(3, {}) and saver.wait() and checkpoints.saved == [3]
    assert saver.save(4, {}) and not saver.save(5, {}) and saver.save(6, {})
    with pytest.raises(CheckpointError, match="step 6"):
        saver.check()


def test_the_last_save_is_tried_until_it_works(monkeypatch):
    monkeypatch.setattr("bvl.train.saving.PAUSE_S", 0.0)
    checkpoints = FakeCheckpoints("background", "start", None)
    Saver(checkpoints, max_failures=3, flush=lambda: None).finish(9, {})
    assert checkpoints.saved == [9]
    with pytest.raises(CheckpointError):
        Saver(FakeCheckpoints("background", "start"), max_failures=2, flush=lambda: None).finish(9, {})


def test_rows_that_cannot_be_written_hold_back_the_checkpoint():
    """Else a resume would lose them."""

    def full():
        raise OSError(errno.ENOSPC, "full")

    checkpoints = FakeCheckpoints(None)
    assert not Saver(checkpoints, max_failures=3, flush=full).save(1, {})
    assert not checkpoints.saved and checkpoints.plan == [None]


def test_rows_wait_for_space(tmp_path, caplog):
    """Also the rest of one of which the disk took a part."""
    rows = JsonLines(tmp_path / "rows.jsonl")
    file, space = rows._file, [7, 0, 0, 10_000]

    class Disk:
        close = file.close

        def write(self, text):
            room = space.pop(0)
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return file.write(text[:room])

    rows._file = Disk()
    rows.write({"step": 1})
    assert "NOT WRITTEN" in caplog.text and "1 rows wait" in caplog.text
    with pytest.raises(OSError):
        rows.flush()
    rows.write({"step": 2})
    rows.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "rows.jsonl").open()] == [1, 2]


def test_a_full_disk_ends_the_points_not_the_run(tmp_path, monkeypatch, caplog):
    board = TensorBoard(tmp_path, resume_step=0)
    monkeypatch.setattr("threading.excepthook", lambda *_: None)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(board._writer.file_writer.event_writer._ev_writer, "write_event", full)
    board.write(1, {"a": 1.0})
    board._thread.join(20)
    for step in range(2, 200):
        board.write(step, {"a": 1.0, "b": None})
    board.close()
    assert caplog.text.count("no more points for TensorBoard") == 1


def test_options_are_checked():
    for options in ({"spike_factor": 1.0}, {"host_timeout_s": 0}, {"watchdog_s": -1}, {"watchdog_stop_s": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            SurviveConfig(**options)


def judged(guard, losses, norms=None):
    """(which steps are bad, the reports) of steps with these losses."""
    state, judge, bad, reports = guard.init(), jax.jit(guard.judge), [], []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        wrong, state, report = judge(state, jnp.float32(loss), jnp.float32(norm))
        bad.append(bool(wrong)), reports.append(report)
    return bad, reports


def test_what_is_a_spike():
    """Above the factor times the mean of good steps, which spikes do not move; not before there is a mean."""
    guard = Guard.of(SurviveConfig(spike_factor=3.0))
    losses = [9.0, *[2.0] * (FIRST - 1), 8.0, 6.0, 8.0, float("nan"), 2.0]
    bad, reports = judged(guard, losses)
    assert [i for i, wrong in enumerate(bad) if wrong] == [FIRST, FIRST + 2, FIRST + 3]
    mean = np.mean(losses[:FIRST])
    np.testing.assert_allclose(reports[FIRST]["mean_loss"], mean, rtol=1e-5)
    np.testing.assert_allclose(reports[FIRST + 1]["mean_loss"], mean, rtol=1e-5)
    assert [int(r["in_row"]) for r in reports[FIRST:]] == [1, 0, 1, 2, 0]
    norms = [1.0] * (FIRST + 1)
    assert judged(guard, [2.0] * (FIRST + 1), [*norms[:-1], 3.5])[0][-1]
    # Of a negative loss no factor says what is too much.
    assert not any(judged(guard, [-1.0] * FIRST + [-0.1, 1.0])[0])


def test_a_guard_only_where_it_is_asked_for():
    assert Guard.of(SurviveConfig()) is None
    guard = Guard.of(SurviveConfig(bad_steps="skip"))
    assert judged(guard, [1.0] * (FIRST + 1) + [1e9, float("inf")])[0][-2:] == [False, True]


SPIKE = {
    "loss": 3.0, "grad_norm": 5.0, "mean_loss": 2.0, "mean_grad_norm": 1.0, "bad": True, "in_row": 1
}  # fmt: skip


def read(run, report, **survive):
    """The reader after a step that gave `report`."""
    config = SimpleNamespace(seed=3, survive=SurviveConfig(**survive))
    describe = lambda source, record: {"source": "ab"[source], "id": f"r{record}"}  # noqa: E731
    reader = StepReader(RunFolder(run), config, share=1, describe=describe, last_good=lambda: 10)
    batch = {"source": np.asarray([0, 1]), "record": np.asarray([5, 6])}
    reader.take(12, {"tasks": {}, "step": {}, "guard": report, STOP: jnp.int32(130)}, batch)
    reader.read()
    return reader


def test_a_spike_is_named_with_its_records(tmp_path, monkeypatch, caplog):
    """Of all hosts' rows, in their order; hosts that share rows name them once."""
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, [0, [{"source": "c", "id": "r7"}]], mine])
    with pytest.raises(
        TrainingFailed,
        match=r"grad norm of step 12, 5, is more than survive.spike_factor=4 times its running mean 1;.*of step 10.*"
        r"survive.bad_steps=skip leaves.*a larger survive.spike_factor",
    ):
        read(tmp_path, SPIKE, spike_factor=4.0)
    saved = json.loads((tmp_path / "nan_batch.json").read_text())
    assert [(r["source"], r["id"]) for r in saved["records"]] == [("c", "r7"), ("a", "r5"), ("b", "r6")]
    reader = read(tmp_path, SPIKE, spike_factor=4.0, bad_steps="skip")
    assert reader.told_to_stop == 130 and "the step is skipped (1 in a row)" in caplog.text
    assert (tmp_path / "bad_batches" / "12.json").is_file()
    monkeypatch.setattr("bvl.train.bad_steps.MAX_FILES", 1)
    (tmp_path / "bad_batches" / "12.json").rename(tmp_path / "bad_batches" / "1.json")
    read(tmp_path, SPIKE, spike_factor=4.0, bad_steps="skip")
    assert not (tmp_path / "bad_batches" / "12.json").exists()
    read(tmp_path, {**SPIKE, "bad": False}, spike_factor=4.0)


def test_the_bad_step_that_ends_a_run_is_kept(tmp_path, monkeypatch):
    """Also where there are as many files of skipped ones as there may be."""
    monkeypatch.setattr("bvl.train.bad_steps.MAX_FILES", 0)
    (tmp_path / "bad_batches").mkdir()
    last = {**SPIKE, "loss": float("nan"), "in_row": 4}
    with pytest.raises(TrainingFailed, match="number 4 in a row .*max_skipped=3.*nan_batch.json") as error:
        read(tmp_path, last, bad_steps="skip", max_skipped=3)
    assert "spike_factor" not in str(error.value) and "bad_steps=skip" not in str(error.value)
    assert json.loads((tmp_path / "nan_batch.json").read_text())["step"] == 12
    assert not list((tmp_path / "bad_batches").iterdir())


def test_a_full_disk_while_a_bad_step_is_noted(tmp_path, monkeypatch, caplog):
    """The run goes on, or ends with the bad step as the reason."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bvl.train.bad_steps.write_atomic", full)
    read(tmp_path, SPIKE, spike_factor=4.0, bad_steps="skip")
    assert "NOT WRITTEN: the records of the bad step 12" in caplog.text and "is skipped" in caplog.text
    with pytest.raises(TrainingFailed, match="grad norm of step 12.*records could not be written"):
        read(tmp_path, SPIKE, spike_factor=4.0)


def test_only_the_first_host_writes_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0, tensorboard=True)
    log.write(1, {"a": 1.0}), log.flush(), log.close()
    assert not list(tmp_path.iterdir())
