"""Checkpoints: round trip, retention, damage of every kind, and a full disk."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bvl.checkpoint import Checkpoints
from bvl.errors import CheckpointError, ConfigError
from bvl.train.saving import Saver

# orbax drops the reads that were under way when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def items(step, size=200):
    return {
        "params": {"w": jnp.full((size, size), step, jnp.float32), "b": jnp.arange(7.0)},
        "rest": {"step": jnp.asarray(step), "opt_state": (jnp.ones(3) * step, None)},
    }


def with_sums(step):
    return items(step) | {"sums": {"loss": jnp.asarray([1.5, 2.0])}}


def abstract(size=200):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), items(0, size))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def write(folder, steps, *, metrics=None, **options):
    """Save `steps` and close; returns the steps that stay."""
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, with_sums(step), (metrics or {}).get(step))
    checkpoints.wait()
    stay = checkpoints.steps()
    checkpoints.close()
    return stay


def restored_step(folder, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        step, tree = checkpoints.restore_latest(abstract())
        assert (np.asarray(tree["params"]["w"]) == step).all() and int(tree["rest"]["step"]) == step
        return step
    finally:
        checkpoints.close()


def test_round_trip(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() is None and checkpoints.restore_latest(abstract()) is None
    checkpoints.save(3, items(3) | {"sums": {"loss": jnp.asarray([1.5, 2.0])}}, {"a/b": 0.25})
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step, tree = checkpoints.restore_latest(abstract(), optional={"sums": device, "ema": device})
    assert step == 3 and set(tree) == {"params", "rest", "sums"}
    assert isinstance(tree["rest"]["opt_state"], tuple)
    jax.tree.map(np.testing.assert_array_equal, {k: tree[k] for k in ("params", "rest")}, items(3))
    np.testing.assert_array_equal(tree["sums"]["loss"], [1.5, 2.0])
    assert checkpoints.describe(3, "params")["w"].shape == (200, 200)
    assert checkpoints.describe(3, "ema") is None
    checkpoints.close()


def test_parameters_load_alone(folder):
    write(folder, [2])
    reader = Checkpoints(folder, read_only=True)
    assert set(reader.restore(2, {"params": abstract()["params"]})) == {"params"}
    reader.close()


def test_reading_warns_of_nothing(folder, capfd, caplog):
    write(folder, [2])
    Checkpoints(folder, read_only=True).close()
    assert "read_only" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize("keep, stay", [(1, [8]), (3, [4, 6, 8])])
def test_the_last_stay(folder, keep, stay):
    assert write(folder, [2, 4, 6, 8], keep=keep) == stay


def test_keep_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match="keep=0"):
        Checkpoints(folder, keep=0)


@pytest.mark.parametrize("mode, best", [("max", 4), ("min", 2)])
def test_the_best_stays(folder, mode, best):
    """Also across a restart, and checkpoints without an evaluation do not pile up."""
    options = dict(keep=1, best="val/auroc", best_mode=mode)
    scores = {2: {"val/auroc": 0.1}, 4: {"val/auroc": 0.9}, 6: {"val/auroc": 0.5}}
    assert write(folder, [2, 3, 4, 5, 6], metrics=scores, **options) == sorted({best, 6})
    assert write(folder, [7, 8], **options) == [best, 8]
    assert write(folder, [9], metrics={9: {"val/auroc": 0.5, "other": 1.0}}, **options) == [best, 9]
    reader = Checkpoints(folder, read_only=True)
    assert reader.best("val/auroc", mode) == best
    assert reader.best("unheard/of", mode) is None
    reader.close()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest_file(folder)
    os.truncate(file, file.stat().st_size // 2)


def flip(folder, pattern):
    """One bit in the midst of the largest of these files."""
    file = max(folder.glob(pattern), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped bit of parameters": lambda folder: flip(folder, "params/**/d/*"),
    "flipped bit of the rest": lambda folder: flip(folder, "rest/**/d/*"),
    "flipped bit of the checksums": lambda folder: flip(folder, "checksums.json"),
    "missing optional item": lambda folder: shutil.rmtree(folder / "sums"),
    "truncated file": truncate,
    "missing file": lambda folder: largest_file(folder).unlink(),
    "missing manifest": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
    "missing item": lambda folder: shutil.rmtree(folder / "rest"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(folder, damage, caplog):
    """The one before is used, nothing is deleted, and the step can be saved again, twice over."""
    write(folder, [2, 4])
    for count in (1, 2):
        DAMAGES[damage](folder / "4")
        caplog.clear()
        assert restored_step(folder) == 2
        aside = folder.parent / "damaged"
        assert len(list(aside.iterdir())) == count
        assert str(folder / "4") in caplog.text and str(aside) in caplog.text and "step 2" in caplog.text
        assert write(folder, [4]) == [2, 4]
        assert restored_step(folder) == 4


def test_a_checkpoint_without_checksums_is_taken(folder):
    write(folder, [2])
    (folder / "2" / "checksums.json").unlink()
    assert restored_step(folder) == 2


def test_a_reader_of_parameters_checks_them_alone(folder):
    write(folder, [2])
    flip(folder / "2", "rest/**/d/*")
    reader = Checkpoints(folder, read_only=True)
    reader.restore(2, {"params": abstract()["params"]})
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged: rest/.* has other bytes than were"):
        reader.restore(2, abstract())
    reader.close()


def test_only_damaged_ones_are_an_error(folder):
    write(folder, [2, 4])
    truncate(folder / "2"), truncate(folder / "4")
    checkpoints = Checkpoints(folder)
    with pytest.raises(CheckpointError, match=r"checkpoints/4 is damaged"):
        checkpoints.restore_latest(abstract())
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


def test_the_left_over_of_a_killed_save_is_not_a_checkpoint(folder):
    write(folder, [2])
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    reader = Checkpoints(folder, read_only=True)
    assert reader.steps() == [2]
    reader.close()
    assert (folder / "4.orbax-checkpoint-tmp").is_dir(), "a reader deletes nothing"
    assert restored_step(folder) == 2
    assert write(folder, [4]) == [2, 4]


def test_other_shapes_are_named(folder):
    write(folder, [2, 4])
    checkpoints = Checkpoints(folder)
    with pytest.raises(
        CheckpointError, match=r"(?s)1 arrays differ.*params/w: there \(200, 200\), here \(100, 100\)"
    ):
        checkpoints.restore_latest(abstract(100))
    assert checkpoints.steps() == [2, 4] and not (folder.parent / "damaged").exists()
    checkpoints.close()


def test_devices_without_memory_damage_no_checkpoint(folder, monkeypatch):
    write(folder, [2, 4])
    checkpoints = Checkpoints(folder)
    for text, error in (
        ("RESOURCE_EXHAUSTED: Out of memory", jax.errors.JaxRuntimeError),
        ("INTERNAL", CheckpointError),
    ):

        def fail(*_, text=text):
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(checkpoints, "_restore", fail)
        with pytest.raises(error, match=text):
            checkpoints.restore_latest(abstract())
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_the_start_of_a_save(folder, monkeypatch):
    write(folder, [2, 4])
    checkpoints = Checkpoints(folder, keep=1)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", full_disk)
    with pytest.raises(
        CheckpointError, match="step 6 could not be saved.*No space left.*goes on from step 4"
    ):
        checkpoints.save(6, items(6))
        checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"], (
        "a left-over takes the space of the next save"
    )
    checkpoints.close()
    monkeypatch.undo()
    assert restored_step(folder) == 4
    assert write(folder, [6]) == [4, 6]


def test_full_disk_in_the_background(folder, monkeypatch, caplog):
    """The error comes with the next call, and retention has deleted nothing for a checkpoint that is not there."""
    write(folder, [2, 4])
    checkpoints = Checkpoints(folder, keep=1)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full_disk)
    checkpoints.save(6, items(6))
    with pytest.raises(
        CheckpointError, match="step 6 could not be saved.*No space left.*goes on from step 4"
    ):
        checkpoints.save(8, items(8))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
    checkpoints.close()
    monkeypatch.undo()
    assert restored_step(folder) == 4


@pytest.mark.parametrize("method", ["async_save", "finalize"])
def test_a_step_that_could_not_be_saved_is_saved_again(folder, monkeypatch, method):
    """By the same process, as at the end of a run; nothing of the failed save is left."""
    monkeypatch.setattr("bvl.train.saving.PAUSE_S", 0.0)
    real, failures = getattr(ocp.PyTreeCheckpointHandler, method), [1, 1]

    def sometimes_full(*args, **options):
        return full_disk() if failures and failures.pop() else real(*args, **options)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, method, sometimes_full)
    checkpoints = Checkpoints(folder)
    Saver(checkpoints, max_failures=3, flush=lambda: None).finish(6, items(6))
    checkpoints.close()
    assert not failures and [p.name for p in folder.iterdir()] == ["6"]
    assert restored_step(folder) == 6


def test_closing_reports_a_failed_save_without_raising(folder, monkeypatch, caplog):
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full_disk)
    checkpoints.save(2, items(2))
    checkpoints.close()
    assert "step 2 could not be saved" in caplog.text and "no checkpoint is complete yet" in caplog.text


def test_files_that_cannot_grow(folder):
    """As on a full disk, by the operating system: no file of the process may exceed 50 kB."""
    write(folder, [2])
    script = """
        import resource, sys
        from pathlib import Path
        from bvl.checkpoint import Checkpoints
        from bvl.errors import CheckpointError
        import jax.numpy as jnp

        checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
        tree = {"params": {"w": jnp.ones((200, 200)), "b": jnp.ones(7)}, "rest": {"step": jnp.asarray(4)}}
        tree["params"]["w"].block_until_ready()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoints.save(4, tree)
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
            sys.exit(7)
        finally:
            checkpoints.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert "step 4 could not be saved" in done.stdout and "goes on from step 2" in done.stdout
    assert restored_step(folder) == 2
    assert write(folder, [4]) == [2, 4]
