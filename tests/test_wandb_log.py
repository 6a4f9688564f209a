"""The writer to Weights & Biases, against a module that only records its calls."""

import sys
import types

import pytest
from tiny_run import tiny_config

from bvl.config import LogConfig
from bvl.errors import ConfigError
from bvl.runs import RunFolder
from bvl.train.loop import train
from bvl.train.metrics_log import MetricsLog
from bvl.train.wandb_log import WandbLog


class Recorder(types.ModuleType):
    """Stands in for the module wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.starts, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, metrics, *, step):
        self.rows.append((step, metrics))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_go_to_the_same_run_after_a_resume(tmp_path, wandb):
    config = tiny_config(tmp_path / "mine", log=LogConfig(wandb="phantoms", tensorboard=False))
    (tmp_path / "mine").mkdir()
    run = RunFolder(tmp_path / "mine")
    for start in (0, 4):
        log = MetricsLog(run.metrics, resume_step=start, tensorboard=False, wandb=WandbLog(run, config))
        log.write(start + 2, {"loss/total": 1.5, "eval/zero/accuracy": 0.5})
        log.close()
    first, second = wandb.starts
    assert first["id"] == second["id"] and len(first["id"]) == 8 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("phantoms", "mine", str(run.path))
    assert first["config"]["optim"]["lr"] == 1e-3
    assert wandb.rows == [(step, {"loss/total": 1.5, "eval/zero/accuracy": 0.5}) for step in (2, 6)]
    assert wandb.finished == 2


def test_two_folders_are_two_runs(tmp_path, wandb):
    for name in ("a", "b"):
        WandbLog(RunFolder(tmp_path / name), tiny_config(log=LogConfig(wandb="p")))
    assert wandb.starts[0]["id"] != wandb.starts[1]["id"]


def test_not_installed(tmp_path, monkeypatch):
    """Said before anything is read or written."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log.wandb needs the package wandb.*pip install 'bvl\[wandb\]'"):
        train(tiny_config(tmp_path / "run", log=LogConfig(wandb="p")))
    assert not (tmp_path / "run" / "config.json").exists()


def test_it_does_not_start(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("no API key")

    wandb.init = init
    with pytest.raises(ConfigError, match="W&B did not start: no API key.*WANDB_MODE=offline"):
        WandbLog(RunFolder(tmp_path / "run"), tiny_config(log=LogConfig(wandb="p")))
