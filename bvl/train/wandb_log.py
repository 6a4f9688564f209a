"""The optional writer to Weights & Biases."""

from __future__ import annotations

import importlib
import secrets
from typing import Any

from bvl.config import Config, to_dict
from bvl.errors import ConfigError
from bvl.runs import RunFolder, write_atomic


def import_wandb() -> Any:
    """The module; raises ConfigError, naming the extra to install, where there is none."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"log.wandb needs the package wandb, which cannot be imported ({error}): pip install 'bvl[wandb]', "
            f"or leave log.wandb out"
        ) from error


class WandbLog:
    """Rows to the project `config.log.wandb`; a run that goes on writes to the same W&B run.

    Its id is kept in the run folder. Without network set WANDB_MODE=offline and `wandb sync` later. Steps that are
    done again after a kill are dropped by W&B, which is right since they give the same rows.
    """

    def __init__(self, run: RunFolder, config: Config):
        wandb = import_wandb()
        file = run.path / "wandb_id.txt"
        if not file.is_file():
            write_atomic(file, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=file.read_text().strip(),
                resume="allow",
                name=run.path.absolute().name,
                dir=str(run.path),
                config=to_dict(config),
            )
        except Exception as error:  # its own types are known only where it is installed
            raise ConfigError(
                f"log.wandb: W&B did not start: {error}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()
