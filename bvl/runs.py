"""The run folder: where its files lie, its lock, and how a model is loaded from it.

config.json  env.json  checkpoints/  metrics.jsonl  eval.json  eval/<name>.json  predictions/*.jsonl
tokenizer.json  preprocess.json  classes.json  calibration.json  bad_records.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from bvl import config as config_lib
from bvl import hosts
from bvl.assembly import build_model, embedding_rows
from bvl.checkpoint import Checkpoints, complete_steps
from bvl.convert.importing import Imported, import_model
from bvl.convert.registry import is_foreign, looks_foreign
from bvl.data.images import open_image
from bvl.data.text import Tokenizer
from bvl.data.transforms import Preprocess, Transformed, apply
from bvl.errors import CheckpointError, RunFolderError
from bvl.mesh import MeshConfig, make_mesh, on_mesh, replicated, rows_on_devices, split_rows, whole
from bvl.models.features import ImageFeatures, TextFeatures
from bvl.models.vlm import DualEncoder, normalize_image

# A listing of runs holds the lock for an instant.
LOCKED_WITHIN_S = 2.0
# How long a host waits to see what the first one has written.
SHARED_WITHIN_S = 30.0


class RunFolder:
    """Paths of a run folder, its lock and the check that it belongs to a config."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.env = self.path / "env.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.eval = self.path / "eval.json"
        self.evals = self.path / "eval"
        self.predictions = self.path / "predictions"
        self.tokenizer = self.path / "tokenizer.json"
        self.preprocess = self.path / "preprocess.json"
        self.classes = self.path / "classes.json"
        self.calibration = self.path / "calibration.json"
        self.bad_records = self.path / "bad_records.jsonl"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, by the first host for all; raises RunFolderError naming the process that holds it already,
        and where another host does not see the folder."""
        with contextlib.ExitStack() as stack:
            # The first host alone, since file systems differ in what a lock means elsewhere.
            hosts.on_first(lambda: stack.enter_context(self._lock()))
            self._check_shared()
            yield

    def _check_shared(self) -> None:
        holder = hosts.broadcast((self.path / ".lock").read_text() if hosts.is_first() else None)
        # A network file system may show a new file some seconds late.
        end = time.monotonic() + SHARED_WITHIN_S
        while not (seen := _text_of(self.path / ".lock") == holder) and time.monotonic() < end:
            time.sleep(0.5)
        blind = [str(number) for number, sees in enumerate(hosts.gather(seen)) if not sees]
        if blind:
            raise RunFolderError(
                f"workdir {self.path.absolute()} is not the same folder on host(s) {', '.join(blind)}: it must lie on a "
                f"file system that all hosts share"
            )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "a+")
        except OSError as error:
            raise RunFolderError(f"workdir {self.path} cannot be written: {error.strerror}") from error
        with file:
            end = time.monotonic() + LOCKED_WITHIN_S
            while not _locked(file):
                if time.monotonic() > end:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunFolderError(
                        f"workdir {self.path} is in use by {holder}; stop that run or choose another workdir"
                    )
                time.sleep(0.1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            yield

    def has_checkpoint(self) -> bool:
        """Is there a complete checkpoint to go on from? As the first host sees it, on all."""
        return hosts.broadcast(bool(complete_steps(self.checkpoints)))

    def claim(self, config: config_lib.Config, *, force: bool) -> None:
        """Check that the folder is free or was started with this config; a free one gets its config.json.

        A folder without a complete checkpoint is free: what an earlier attempt derived from its data is removed
        and made again. Where there is one, nothing is written before `keep_config`.
        Raises RunFolderError with the differing keys unless `force`.
        """
        hosts.on_first(lambda: self._claim(config, force))

    def _claim(self, config: config_lib.Config, force: bool) -> None:
        if self.config.is_file() and "format_version" not in _read_object(self.config):
            raise RunFolderError(
                f"workdir {self.path} holds a config.json of something else; choose another workdir"
            )
        if not complete_steps(self.checkpoints):
            if self.config.is_file():
                for file in (self.tokenizer, self.classes, self.env, self.calibration):
                    file.unlink(missing_ok=True)
            write_atomic(self.config, config_lib.dump(config))
            return
        if not self.config.is_file():
            raise RunFolderError(
                f"workdir {self.path} has checkpoints but no config.json; choose another workdir"
            )
        old = json.loads(self.config.read_text())
        lines = config_lib.difference(old, config_lib.to_dict(config))
        if lines and not force:
            raise RunFolderError(
                f"workdir {self.path} belongs to another config:\n  "
                + "\n  ".join(lines)
                + "\nchoose another workdir, or add --force to go on with the new values"
            )

    def keep_config(self, config: config_lib.Config) -> None:
        """Write config.json and preprocess.json, once the folder's checkpoint is known to fit them."""
        write_atomic(self.config, config_lib.dump(config))
        write_atomic(self.preprocess, json.dumps(config.data.preprocess.to_dict(), indent=2) + "\n")


def _locked(file: IO[str]) -> bool:
    try:
        # The kernel drops the lock with the process, also after kill -9.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process dies.

    Of several hosts the first one writes; all have the same to say.
    """
    if not hosts.is_first():
        return
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Encoder:
    """Compiled encoding of padded batches, shared by everything that reads a model."""

    def __init__(self, model: DualEncoder, preprocess: Preprocess, mesh: jax.sharding.Mesh):
        self.mesh, self.preprocess = mesh, preprocess

        @on_mesh(mesh)
        def image(params, image, need):
            image = normalize_image(image, preprocess.mean, preprocess.std, model.dtype)
            return model.apply({"params": params}, image, need, method="encode_image")

        @on_mesh(mesh)
        def text(params, tokens, mask, need):
            return model.apply({"params": params}, tokens, mask, need, method="encode_text")

        self.image = jax.jit(image, static_argnames="need", out_shardings=replicated(mesh))
        self.text = jax.jit(text, static_argnames="need", out_shardings=replicated(mesh))
        self.scale_and_bias = jax.jit(lambda p: model.apply({"params": p}, method="logit_scale_and_bias"))


@dataclasses.dataclass
class Components:
    """A loaded model and all that belongs to it. `params` = {"model": ..., "heads": {task: ...}}."""

    model: DualEncoder
    params: Any
    tokenizer: Tokenizer
    preprocess: Preprocess
    config: config_lib.Config
    classes: tuple[str, ...]
    encoder: Encoder
    step: int = 0
    # Presence logits of held-out absent phrases, as calibration.json holds them (bvl/evals/grounding.py).
    calibration: dict[str, Any] | None = None
    _hash: str | None = None

    def encode_images(
        self, images: Iterable[Any], need: frozenset[str], batch_size: int = 64
    ) -> Iterator[ImageFeatures]:
        """Features (numpy) of images of any kind and number, batch by batch, in order."""
        for chunk in _batched(images, batch_size):
            pixels = np.stack([self.pixels(image) for image in chunk])
            features = self.encoder.image(self.params["model"], self._padded(pixels, batch_size), need=need)
            yield _first_rows(features, len(chunk))

    def encode_texts(
        self, texts: Iterable[str], need: frozenset[str], batch_size: int = 64
    ) -> Iterator[TextFeatures]:
        """Features (numpy) of texts, batch by batch, in order."""
        for chunk in _batched(texts, batch_size):
            tokens, mask = self.tokenizer.encode_texts(chunk)
            features = self.encoder.text(
                self.params["model"],
                self._padded(tokens, batch_size),
                self._padded(mask, batch_size),
                need=need,
            )
            yield _first_rows(features, len(chunk))

    def pixels(self, image: Any) -> np.ndarray:
        """The evaluation view of one image: uint8 [H, W, 3]."""
        return self.transform(image).image

    def transform(self, image: Any) -> Transformed:
        """The evaluation view of one image, and the way back to the original."""
        return apply(open_image(image), preprocess=self.preprocess)

    def scale_and_bias(self) -> tuple[float, float]:
        scale, bias = self.encoder.scale_and_bias(self.params["model"])
        return float(scale), float(bias)

    def weights_hash(self) -> str:
        """Short hash of the parameters' values."""
        if self._hash is None:
            digest = hashlib.sha256()
            for path, leaf in sorted(
                (jax.tree_util.keystr(path), leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(self.params)
            ):
                digest.update(path.encode())
                digest.update(np.ascontiguousarray(whole(leaf)).tobytes())
            self._hash = digest.hexdigest()[:12]
        return self._hash

    def _padded(self, rows: np.ndarray, batch_size: int) -> jax.Array:
        # One shape, one compilation: the last batch is filled up.
        size = rows_on_devices(batch_size, self.encoder.mesh)
        padded = np.zeros((size, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        return split_rows(padded, self.encoder.mesh)


def _first_rows(features: Any, count: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[:count], features)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def load_components(
    spec: str | Path, *, checkpoint: str | int = "latest", use_ema: bool | None = None
) -> Components:
    """Load a run folder onto one device, or the folder of another library ("open_clip:DIR", "hf:DIR").

    Needs nothing outside the folder.
    checkpoint: "latest", "best" (by the config's checkpoint.best), or a step.
    use_ema: take the moving average of the parameters where the run keeps one; None = as its eval.use_ema says.
    Raises RunFolderError or CheckpointError, and ConversionError for the folder of another library.
    """
    if is_foreign(spec):
        return components_of(import_model(spec))
    run = RunFolder(spec)
    if looks_foreign(run.path):
        raise RunFolderError(
            f"{run.path} is no run folder but a model of another library: write open_clip:{run.path} or hf:{run.path}"
        )
    if not run.config.is_file():
        there = (
            ", ".join(sorted(p.name for p in run.path.iterdir())[:8])
            if run.path.is_dir()
            else "a file; give its folder"
            if run.path.exists()
            else "no such folder"
        )
        raise RunFolderError(f"{run.path} is no run folder: config.json is missing ({there})")
    config = config_lib.load_dump(run.config)
    for file in (run.tokenizer, run.preprocess):
        if not file.is_file():
            raise RunFolderError(f"{run.path} is incomplete: {file.name} is missing; did its training start?")
    tokenizer = Tokenizer.of(run.tokenizer, config.data.tokenizer)
    preprocess = Preprocess.from_dict(json.loads(run.preprocess.read_text()))
    classes = tuple(json.loads(run.classes.read_text())) if run.classes.is_file() else ()
    if not run.checkpoints.is_dir():
        raise CheckpointError(f"{run.path} has no checkpoint yet")
    checkpoints = Checkpoints(run.checkpoints, read_only=True, tokenizer=tokenizer.hash)
    try:
        step = _choose(checkpoints, checkpoint, config, run.path)
        use_ema = config.eval.use_ema if use_ema is None else use_ema
        item = "ema" if use_ema and checkpoints.describe(step, "ema") is not None else "params"
        mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)),
            checkpoints.describe(step, item),
        )
        params = checkpoints.restore(step, {item: abstract})[item]
    finally:
        checkpoints.close()
    model = build_model(config, tokenizer)
    check_vocabulary(params["model"], tokenizer, str(run.path), rows=embedding_rows(config, tokenizer))
    encoder = Encoder(model, preprocess, mesh)
    calibration = json.loads(run.calibration.read_text()) if run.calibration.is_file() else None
    return Components(
        model, params, tokenizer, preprocess, config, classes, encoder, step, calibration=calibration
    )


def components_of(imported: Imported) -> Components:
    """A model that was read from the folder of another library, as one that was trained."""
    config, tokenizer = imported.config, imported.tokenizer
    model = build_model(config, tokenizer)
    encoder = Encoder(model, config.data.preprocess, make_mesh(MeshConfig(), devices=jax.local_devices()[:1]))
    return Components(model, imported.params, tokenizer, config.data.preprocess, config, (), encoder)


def save_components(components: Components, folder: Path) -> None:
    """Write a run folder at step 0, to be loaded, evaluated and started from; raises RunFolderError if it is taken."""
    run = RunFolder(folder)
    if run.path.exists() and any(run.path.iterdir()):
        raise RunFolderError(f"{run.path} exists and is not empty; choose another folder")
    run.path.mkdir(parents=True, exist_ok=True)
    components.tokenizer.save(run.tokenizer)
    write_atomic(run.classes, json.dumps(list(components.classes)) + "\n")
    run.keep_config(components.config)
    checkpoints = Checkpoints(run.checkpoints, tokenizer=components.tokenizer.hash)
    try:
        checkpoints.save(0, {"params": components.params})
        checkpoints.wait()
    finally:
        checkpoints.close()


def _choose(checkpoints: Checkpoints, wanted: str | int, config: config_lib.Config, path: Path) -> int:
    # A run that is still in training may have another one when the next host looks.
    steps = hosts.broadcast(checkpoints.steps())
    if not steps:
        raise CheckpointError(f"{path} has no complete checkpoint yet")
    if wanted == "latest":
        return steps[-1]
    if wanted == "best":
        name = config.checkpoint.best
        step = checkpoints.best(name, config.checkpoint.best_mode) if name else None
        if step is None:
            raise CheckpointError(
                f"{path}: no checkpoint has the metric checkpoint.best={name!r}; steps are {steps}"
            )
        return step
    if not str(wanted).isdigit():
        raise CheckpointError(
            f"{path} has no checkpoint {wanted!r}: give latest, best or one of the steps {steps}"
        )
    if int(wanted) not in steps:
        raise CheckpointError(f"{path} has no checkpoint of step {wanted}; steps are {steps}")
    return int(wanted)


def check_vocabulary(params: Any, tokenizer: Tokenizer, where: str, *, rows: int | None = None) -> None:
    """Raise CheckpointError unless the token embeddings have a row for every id of the tokenizer.

    rows: how many they should have, where it is more (`embedding_rows`).
    """
    wanted = tokenizer.vocab_size if rows is None else rows
    for part in ("text", "decoder"):
        found = params[part]["token_embed"].shape[0] if part in params else wanted
        if found != wanted:
            raise CheckpointError(
                f"{where}: the tokenizer has {wanted} tokens, the checkpoint's {part} {found}; "
                f"use the tokenizer.json that was saved with the checkpoint"
            )
