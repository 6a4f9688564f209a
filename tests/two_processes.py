"""Training runs of several processes on this machine, joined over loopback."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from kill_and_resume import Runner


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Hosts:
    """Starts `bvl WORDS` as `processes` hosts of `devices` fake devices each, in a Runner's folder.

    Messages of host i go to host_<i>.txt there.
    """

    def __init__(self, runner: Runner, *, processes: int = 2, devices: int = 4):
        self.runner, self.processes, self.devices = runner, processes, devices

    def popen(
        self,
        *words: object,
        command: tuple[object, ...] = ("-m", "bvl.cli"),
        environment: dict[str, str] | None = None,
    ) -> list[subprocess.Popen]:
        """The processes, host 0 first; `command` is what Python runs."""
        port, started = free_port(), []
        for host in range(self.processes):
            explicit = {
                "BVL_COORDINATOR": f"127.0.0.1:{port}",
                "BVL_NUM_PROCESSES": str(self.processes),
                "BVL_PROCESS_ID": str(host),
                "JAX_NUM_CPU_DEVICES": str(self.devices),
            }
            with open(self.log_file(host), "a") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, (*command, *words))],
                        env=self.runner.environment | explicit | (environment or {}),
                        cwd=self.runner.folder,
                        stdout=log,
                        stderr=log,
                    )
                )
        return started

    def run(self, *words: object, timeout: float = 300.0, **options: Any) -> list[int]:
        """Exit codes of the hosts."""
        started = self.popen(*words, **options)
        try:
            return [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()

    def log_file(self, host: int) -> Path:
        return self.runner.folder / f"host_{host}.txt"

    def log(self, host: int) -> str:
        """What a host has said."""
        return self.log_file(host).read_text()
