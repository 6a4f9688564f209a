"""A training run of real processes: started, ended by a signal, started again; shared by tests and a tool."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_run import assert_same_trees, metric_rows, saved_items

CONFIG = '''
"""A tiny run on phantoms. bvl train tiny.py workdir=runs/tiny"""

from bvl.config import CheckpointConfig, Config, LogConfig
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import Source
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=60,
        batch_size=8,
        model=DualEncoderConfig(
            image=ViTConfig("XXS/16", pool="mean", width=32, depth=1, num_heads=2),
            text=TextConfig(width=32, depth=1, num_heads=2),
            embed_dim=16,
        ),
        tasks={"contrastive": Contrastive(), "classify": Classify(multi_label=True)},
        data=DataConfig(
            train=(Source(phantoms=Phantoms(num_patients=30, image_size=32), text={"caption": 0.5, "findings": 0.5}),),
            preprocess=Preprocess(image_size=32),
            augment=Augment(),
            tokenizer=TokenizerConfig(vocab_size=300, context_length=16),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=5, ema_decay=0.9),
        checkpoint=CheckpointConfig(every=7, keep=2),
        log=LogConfig(every=5, tensorboard=False),
    )
'''


class Runner:
    """Runs the command in `folder`; compiled programs are kept there or in `compiled`, so that only the first start
    compiles."""

    def __init__(self, folder: Path, *, steps: int = 60, compiled: Path | None = None):
        self.folder = folder
        self.config = folder / "tiny.py"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.replace("steps=60", f"steps={steps}"))
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(compiled or folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
        }

    def popen(self, *words: object) -> subprocess.Popen:
        """`bvl WORDS` as a process; its messages go to a log file."""
        log = open(self.folder / "log.txt", "a")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "bvl.cli", *map(str, words)],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def run(self, *words: object, timeout: float = 300.0) -> int:
        """Exit code of `bvl WORDS`."""
        process = self.popen(*words)
        try:
            return process.wait(timeout)
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def train(self, workdir: str, *overrides: str) -> tuple[object, ...]:
        """The words of the training command."""
        return "train", self.config, f"workdir={workdir}", *overrides

    def wait_for(self, condition, process: subprocess.Popen, timeout: float = 120.0) -> bool:
        """True once condition() holds, False if the process ended first."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.001)
        raise TimeoutError(f"the run did not get there:\n{self.log()[-2000:]}")

    def kill_when(self, workdir: str, condition, *, delay: float = 0.0, number: int = signal.SIGKILL) -> bool:
        """Start the run and, once it trains, send the signal `delay` seconds after condition() holds.

        False if it was complete before.
        """
        started = self.starts()
        process = self.popen(*self.train(workdir))
        try:
            # Until then there may be left-overs of the last kill.
            if not self.wait_for(lambda: self.starts() > started, process):
                return False
            if not self.wait_for(condition, process):
                return False
            return self.wait_or_kill(process, delay, number)
        finally:
            process.kill()
            process.wait()

    def kill_after(self, workdir: str, seconds: float, number: int = signal.SIGKILL) -> bool:
        """Start the run and send the signal after a time, wherever it is then; False if it was complete before."""
        process = self.popen(*self.train(workdir))
        try:
            return self.wait_or_kill(process, seconds, number)
        finally:
            process.kill()
            process.wait()

    def wait_or_kill(self, process: subprocess.Popen, seconds: float, number: int = signal.SIGKILL) -> bool:
        """Was the process still there after `seconds`, so that the signal ended it?"""
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            code = process.wait(120)
            # 0: it was at its very end.
            assert code in (0, -number, 143 if number != signal.SIGKILL else -number), self.log()[-2000:]
            return code != 0

    def starts(self) -> int:
        """How often training got to its first step, so far."""
        return self.log().count("M parameters, ")

    def logged(self) -> int:
        """How many rows of metrics all processes together have shown."""
        return self.log().count("examples/s")

    def rows(self, workdir: str) -> int:
        """Rows of metrics.jsonl."""
        file = self.folder / workdir / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.is_file() else 0

    def saving(self, workdir: str) -> bool:
        """Is a checkpoint being written?"""
        return any((self.folder / workdir / "checkpoints").glob("*tmp*"))

    def steps(self, workdir: str) -> list[int]:
        """Complete checkpoints."""
        return sorted(
            int(p.name) for p in (self.folder / workdir / "checkpoints").glob("*") if p.name.isdigit()
        )


def assert_same_runs(actual: Path, expected: Path) -> None:
    """Parameters, optimiser, average, metric sums and metrics.jsonl (but time/) equal bit for bit."""
    mine, theirs = saved_items(actual), saved_items(expected)
    assert mine.keys() == theirs.keys()
    assert_same_trees(mine, theirs)
    assert metric_rows(actual) == metric_rows(expected)
