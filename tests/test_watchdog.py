"""The watchdog: what is said of a stage that hangs, and what ends the process."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time

from bvl.train.watchdog import Watchdog, stacks


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def reports(caplog):
    return [r.getMessage() for r in caplog.records if "has lasted" in r.getMessage()]


def test_a_stuck_stage_is_named_with_its_stack(caplog):
    """Again after twice the time, and a stage that moves on is not named."""
    watchdog, free = Watchdog(0.1), threading.Event()

    def hang_in_the_reader():
        free.wait()

    stuck = threading.Thread(target=hang_in_the_reader, daemon=True)
    stuck.start()
    for _ in range(20):
        watchdog.enter("step")
        time.sleep(0.01)
    assert not reports(caplog)
    watchdog.enter("data")
    wait_until(lambda: len(reports(caplog)) >= 2)
    watchdog.close()
    free.set()
    assert (
        "the stage 'data' has lasted" in reports(caplog)[0] and "survive.watchdog_s=0.1" in reports(caplog)[0]
    )
    assert "in hang_in_the_reader" in reports(caplog)[0]


def test_without_a_temporary_file_there_are_no_stacks(monkeypatch, caplog):
    """As on a full disk; the stage is named all the same, again and again."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "No space left" in stacks()
    watchdog = Watchdog(0.05)
    watchdog.enter("data")
    wait_until(lambda: len(reports(caplog)) >= 2)
    watchdog.close()


def test_an_inner_stage_begins_the_outer_one_anew():
    watchdog = Watchdog(0.0)
    watchdog.enter("setup")
    began = watchdog._stage[1]
    with watchdog.stage("eval"):
        assert watchdog._stage[0] == "eval"
        time.sleep(0.01)
    assert watchdog._stage[0] == "setup" and watchdog._stage[1] > began
    watchdog.close()


def test_a_stage_that_hangs_too_long_ends_the_process():
    """Also where the main thread never gets to handle anything."""
    script = """
        import threading
        from bvl.train.watchdog import Watchdog

        watchdog = Watchdog(0.0, stop_s=0.2)
        watchdog.enter("barrier")
        threading.Event().wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "the stage 'barrier' has lasted" in done.stderr and "watchdog_stop_s=0.2" in done.stderr
