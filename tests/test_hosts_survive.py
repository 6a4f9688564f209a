"""Two processes of which one is asked to stop, or dies."""

import re
import signal
import textwrap

import pytest
from kill_and_resume import Runner
from two_processes import Hosts

from bvl.train.survive import EXIT_PEER_LOST


@pytest.fixture
def several(tmp_path):
    """(runner, hosts, start): `start(*words, **options)` starts two hosts, which are killed at the end."""
    runner = Runner(tmp_path, steps=5000)
    group, started = Hosts(runner, processes=2, devices=1), []

    def start(*words, **options):
        started[:] = group.popen(*words, **options)
        return started

    yield runner, group, start
    for process in started:
        process.kill()
        process.wait()


def test_one_is_asked_to_stop(several):
    """All stop after the same step, also where both have the same rows, since a layer is split over them."""
    runner, group, start = several
    processes = start(*runner.train("run", "log.every=1", "mesh.shape=[1,1,2]"))
    assert runner.wait_for(lambda: runner.rows("run") > 1, processes[0]), group.log(0)[-3000:]
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in processes] == [143, 143], group.log(0)[-3000:]
    stopped = [int(re.search(r"stopped at step (\d+)", group.log(host))[1]) for host in (0, 1)]
    assert stopped[0] == stopped[1] == runner.steps("run")[-1]
    assert "SIGTERM" in group.log(1) and "SIGTERM" not in group.log(0)


# A host that hangs, as in a collective, but for its watch over the others.
WATCH = """
    import sys, threading
    from bvl import hosts

    hosts.initialise(timeout_s=2.0)
    from bvl.errors import DataError
    from bvl.train.peers import Peers

    peers = Peers(2.0)
    print("watching", flush=True)
    if sys.argv[1] == "fails" and not hosts.is_first():
        peers.failed(DataError("a folder is gone"))
        sys.exit(1)
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    "dies, how, says",
    [
        (1, signal.SIGKILL, "has given no sign of life"),
        (0, signal.SIGKILL, "has died"),
        (0, signal.SIGSTOP, "has given no sign of life"),
        (1, None, "stopped: a folder is gone"),
    ],
)
def test_one_dies_hangs_or_fails(several, dies, how, says):
    """The other one names it, and ends although it hangs: with code 75, or with that of a failure it was told of."""
    runner, group, start = several
    (runner.folder / "watch.py").write_text(textwrap.dedent(WATCH))
    words = "works" if how else "fails"
    processes = start(words, command=(runner.folder / "watch.py",))
    survivor = processes[1 - dies]
    assert runner.wait_for(lambda: "watching" in group.log(0) and "watching" in group.log(1), survivor)
    if how:
        processes[dies].send_signal(how)
    assert survivor.wait(60) == (EXIT_PEER_LOST if how else 1), group.log(1 - dies)
    assert re.search(rf"host {dies} of 2 \(.*, process {processes[dies].pid}\) {says}", group.log(1 - dies))
