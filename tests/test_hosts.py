"""How processes find each other, and what several of them make of a run: the same as one with as many devices."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import Runner
from tiny_run import metric_rows
from two_processes import Hosts

from bvl import hosts
from bvl.errors import ConfigError

EXPLICIT = {"BVL_COORDINATOR": "node1:1234", "BVL_NUM_PROCESSES": "4", "BVL_PROCESS_ID": "3"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "20001",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def test_a_process_on_its_own():
    assert hosts.arguments({}) is None
    assert hosts.arguments(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert hosts.arguments(EXPLICIT | {"BVL_NUM_PROCESSES": "1", "BVL_PROCESS_ID": "0"}) is None
    assert hosts.count() == 1 and hosts.is_first() and hosts.broadcast("x") == "x" and hosts.gather(3) == [3]


def test_explicit_variables():
    found = hosts.arguments(EXPLICIT)
    assert found["coordinator_address"] == "node1:1234"
    assert (found["num_processes"], found["process_id"]) == (4, 3) and "local_device_ids" not in found


def test_slurm():
    found = hosts.arguments(SLURM)
    assert found["coordinator_address"] == f"gpu003:{49152 + 20001 % 16384}"
    assert (found["num_processes"], found["process_id"]) == (2, 1) and "local_device_ids" not in found
    both = hosts.arguments(SLURM | {"BVL_COORDINATOR": "login:99"})
    assert (both["coordinator_address"], both["process_id"]) == ("login:99", 1)
    shared = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "2"}
    assert hosts.arguments(shared)["local_device_ids"] == [2]


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,012],x", "gpu003"),
        ("a[1,2]", "a1"),
        ("x-1-[07]", "x-1-07"),
    ],
)
def test_the_first_node(nodes, first):
    assert hosts.first_node(nodes) == first


def test_what_jax_finds_by_itself():
    assert hosts.arguments({"BVL_DISTRIBUTED": "auto"}) == {}


@pytest.mark.parametrize(
    "environment, match",
    [
        ({"BVL_COORDINATOR": "a:1"}, "BVL_NUM_PROCESSES, BVL_PROCESS_ID must be set too"),
        (EXPLICIT | {"BVL_COORDINATOR": "node1"}, "give host:port"),
        (EXPLICIT | {"BVL_NUM_PROCESSES": "two"}, "BVL_NUM_PROCESSES='two': give a whole number"),
        (EXPLICIT | {"BVL_PROCESS_ID": "4"}, "numbered 0 to 3"),
        ({"BVL_DISTRIBUTED": "yes"}, "the only value is auto"),
    ],
)
def test_bad_variables(environment, match):
    with pytest.raises(ConfigError, match=match):
        hosts.arguments(environment)


# --- Two processes of four devices, and their checkpoint on other numbers of both -------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of 2 x 4 devices to step 10, then on as 1 x 1; and one of 1 x 1 all the way."""
    folder = tmp_path_factory.mktemp("hosts")
    runner = Runner(folder, steps=15)
    several = Hosts(runner, processes=2, devices=4)
    options = ("mesh.shape=[2,2,2]", "checkpoint.every=10", "log.every=5")
    assert runner.run(*runner.train("one", "checkpoint.every=10", "log.every=5")) == 0, runner.log()
    codes = several.run(*runner.train("several", *options))
    assert codes == [0, 0], several.log(0) + several.log(1)
    return runner, several


def test_two_processes_train_as_one_does(runs):
    runner, _ = runs
    one, several = (metric_rows(runner.folder / name) for name in ("one", "several"))
    assert [row["step"] for row in several] == [5, 10, 15]
    for a, b in zip(several, one, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            # The order of sums differs, and 15 steps of Adam carry it on.
            assert a[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (b["step"], name)


def test_each_host_says_its_share_and_the_first_one_the_rest(runs):
    _, several = runs
    for host in (0, 1):
        lines = [line for line in several.log(host).splitlines() if "devices, rows" in line]
        assert len(lines) == 1 and f"host {host} of 2" in lines[0]
        assert f"4 of 8 devices, rows {4 * host} to {4 * host + 3} of each batch of 8" in lines[0]
    assert "complete" in several.log(0) and "complete" not in several.log(1)


def test_a_checkpoint_of_two_processes_goes_on_with_one(runs):
    runner, _ = runs
    shutil.copytree(runner.folder / "several", runner.folder / "later")
    shutil.rmtree(runner.folder / "later" / "checkpoints" / "15")
    assert runner.run(*runner.train("later", "checkpoint.every=10", "log.every=5", "mesh.shape=[1,1,1]")) == 0
    assert "resuming from step 10" in runner.log()
    whole, later = (metric_rows(runner.folder / name) for name in ("several", "later"))
    assert later[:2] == whole[:2]
    for name, value in whole[2].items():
        assert later[2][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


FOUR = "four processes take half a minute: set BVL_ALL_TESTS=1"


@pytest.fixture(scope="module")
def gradients(runs):
    """(processes, devices of each) -> loss, gradients and records at the same checkpoint of 2 x 4 devices."""
    runner, _ = runs

    def make(processes, devices, mesh):
        out = runner.folder / f"{processes}x{devices}.npz"
        group = Hosts(runner, processes=processes, devices=devices)
        words = runner.config, "several", 10, out, mesh
        codes = group.run(*words, command=(Path(__file__).parent / "gradients_of_hosts.py",))
        assert codes == [0] * processes, "\n".join(group.log(host)[-2000:] for host in range(processes))
        return dict(np.load(out))

    return make


@pytest.mark.parametrize(
    "processes, devices, mesh",
    [
        (2, 4, "2,2,2"),
        (1, 8, "1,8,1"),
        pytest.param(4, 2, "8,1,1", marks=pytest.mark.skipif("BVL_ALL_TESTS" not in os.environ, reason=FOUR)),
    ],
)
def test_a_checkpoint_means_the_same_on_other_hosts(gradients, expected, processes, devices, mesh):
    found = gradients(processes, devices, mesh)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["record"], expected["record"])
    np.testing.assert_array_equal(found["row"], np.arange(8))
    largest = max(np.abs(x).max() for name, x in expected.items() if name not in ("record", "row"))
    for name, value in expected.items():
        # Arrays that are all but zero are measured by the largest of all.
        # The gradient of the scale is a sum of logits, some 10, of either sign: its rounding is theirs.
        least = 1.0 if name == "model/log_scale" else 1e-2 * largest
        error = np.abs(found[name] - value).max() / max(np.abs(value).max(), least)
        assert error <= 1e-5, (name, error)


@pytest.fixture(scope="module")
def expected(gradients):
    return gradients(1, 1, "1,1,1")
