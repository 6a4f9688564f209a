"""The run's config: load a Python file, apply `key=value` overrides, check, dump.

A config file is short Python with `get_config(arg=None) -> Config`. Models, tasks, sources and evaluation
suites are frozen dataclasses that live beside their code; this file composes and checks them and holds only
the run's own keys.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import enum
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from bvl.errors import ConfigError, UserError
from bvl.mesh import MeshConfig

FORMAT_VERSION = 1


def _at_least(options: Any, **minimum: float) -> None:
    for name, least in minimum.items():
        if getattr(options, name) < least:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least {least}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training. `every`: steps between evaluations, 0 = only at the end.

    With `stop_metric`, for example "retrieval_phantoms/t2i_r10", training ends where `stop_patience` evaluations in a
    row did not better the best by more than `stop_min_delta`.
    """

    every: int = 0
    suites: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 256
    # Exponential moving average of the parameters, where the optimiser keeps one; also what is loaded later.
    use_ema: bool = True
    # Also evaluate what training starts from, as eval/before.json.
    before: bool = False
    stop_metric: str | None = None
    stop_mode: Literal["max", "min"] = "max"
    stop_patience: int = 5
    stop_min_delta: float = 0.0

    def __post_init__(self):
        _at_least(self, every=0, batch_size=1, stop_patience=1, stop_min_delta=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`every`: steps between checkpoints, 0 = only at the end; the last `keep` stay, and the best by `best`.

    A save that fails (disk full, folder read-only) is warned of and tried again at the next one; after `max_failures`
    in a row the run stops.
    """

    every: int = 500
    keep: int = 2
    # Name of an evaluation metric, for example "retrieval_phantoms/t2i_r1".
    best: str | None = None
    best_mode: Literal["max", "min"] = "max"
    max_failures: int = 3
    # Costs several times the save's own processor time and saves little on float32 weights.
    compression: bool = False

    def __post_init__(self):
        _at_least(self, every=0, keep=1, max_failures=1)


@dataclasses.dataclass(frozen=True)
class SurviveConfig:
    """What a run does about hosts that die, stages that hang and steps that go wrong.

    A step is bad if its loss or the norm of its gradient is no finite number, or, with `spike_factor`, larger than
    that factor times its running mean over good steps. bad_steps: "stop" ends the run with the batch's records saved;
    "skip" leaves everything but the step counter as it was, counts the step under "skipped", and ends the run after
    more than `max_skipped` in a row.
    """

    # A host that gives no sign of life for so long counts as dead, and ends the others.
    host_timeout_s: float = 100.0
    # A stage (data, step, checkpoint, eval ...) that lasts longer is named in the log with the stacks of all threads,
    # again after twice the time and so on; 0 = never.
    watchdog_s: float = 600.0
    # A stage that lasts longer ends the process; null = never.
    watchdog_stop_s: float | None = None
    bad_steps: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = None
    max_skipped: int = 10

    def __post_init__(self):
        _at_least(self, host_timeout_s=1, watchdog_s=0, max_skipped=0)
        if self.watchdog_stop_s is not None and self.watchdog_stop_s <= 0:
            raise ConfigError(f"watchdog_stop_s={self.watchdog_stop_s}: must be above 0, or null for never")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(f"spike_factor={self.spike_factor}: must be above 1, or null for no such check")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """`every`: steps between rows of metrics.jsonl, 0 = only at the end."""

    every: int = 50
    tensorboard: bool = True
    # Norms of gradients, updates and parameters by group, "grad_norm/<group>" and so on.
    norms: bool = True
    # A project of Weights & Biases that gets the rows too.
    wandb: str | None = None
    # "10:15": a profiler trace of the steps 10 to 15 into the run folder's profile/.
    profile: str | None = None
    # FLOP/s that one device can do at best in this precision, for example 989e12; a row then says the share reached.
    peak_flops: float | None = None

    def __post_init__(self):
        _at_least(self, every=0)
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ConfigError(f"peak_flops={self.peak_flops}: must be above 0, or null")
        _ = self.profile_steps

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step to be traced."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(
                f"profile={self.profile!r}: give the first and the last step to be traced, for example 10:15"
            )
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `batch_size` is global; `workdir` is the run folder."""

    model: Any
    data: Any
    tasks: dict[str, Any]
    optim: Any
    steps: int
    batch_size: int
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    survive: SurviveConfig = SurviveConfig()
    # Models whose parameters this run starts from: run folders (the parameters of their optimiser, not the moving
    # average), "open_clip:DIR" or "hf:DIR"; several, in a tuple or with commas between, are laid over each other
    # (bvl/train/initial.py). This run's own checkpoint wins when there is one.
    init_from: str | tuple[str, ...] | None = None
    # Regular expressions, searched in names such as "model/text/positions": what is taken (empty = all) and what not.
    init_include: tuple[str, ...] = ()
    init_exclude: tuple[str, ...] = ()
    # For a longer context so many of the first text positions stay, of a short table at most half; the others are
    # stretched.
    init_kept_positions: int = 20
    # Run folder whose whole state (optimiser and step too) this run continues.
    resume_from: str | None = None
    # Name -> run folder of models that are only read, such as teachers.
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)
    workdir: str | None = None

    def __post_init__(self):
        _at_least(self, steps=1, batch_size=1, seed=0, init_kept_positions=0)
        for pattern in (*self.init_include, *self.init_exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error

    @property
    def init_sources(self) -> tuple[str, ...]:
        """The models of `init_from`, in order."""
        return split_sources(self.init_from)


def split_sources(init_from: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The models that a value of `init_from` names; raises ConfigError for an empty name."""
    names = init_from.split(",") if isinstance(init_from, str) else init_from or ()
    if not all(name.strip() for name in names):
        raise ConfigError(f"init_from={init_from!r}: give run folders, open_clip:DIR or hf:DIR")
    return tuple(name.strip() for name in names)


# Keys in which a run may differ from the config its folder was started with.
FREE_KEYS = (
    "workdir",
    "log.",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "mesh.",
    "checkpoint.",
    "eval.",
    "survive.",
)


def load_config(spec: str, overrides: list[str] | None = None) -> Config:
    """Load `path/to/config.py[:arg]`, apply `key=value` overrides and check every field.

    Keyword-only parameters of its get_config get what the overrides of these keys say, so that a config can be made
    from, for example, the model of `init_from`.
    """
    path, _, arg = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"no config file {path}{hint}")
    if file.suffix != ".py":
        raise ConfigError(
            f"{path} is no .py file; a config is a Python file with get_config(), as configs/quickstart.py is"
        )
    module_spec = importlib.util.spec_from_file_location(f"bvl_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    # Annotations of dataclasses that the file itself defines are looked up here.
    sys.modules[module_spec.name] = module
    with _errors_of(file):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config() that returns a bvl.config.Config")
    parameters = inspect.signature(module.get_config).parameters.values()
    if arg and all(p.kind is p.KEYWORD_ONLY for p in parameters):
        raise ConfigError(f"{path}: get_config takes no argument, but {arg!r} was given after ':'")
    hints = typing.get_type_hints(Config)
    given = {key.strip(): text.strip() for key, _, text in (o.partition("=") for o in overrides or [])}
    early = {
        p.name: _coerce_text(given[p.name], hints[p.name], p.name)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name in given
    }
    with _errors_of(file):
        config = module.get_config(arg, **early) if arg else module.get_config(**early)
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not bvl.config.Config")
    config = check(config)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        config = with_value(config, key.strip(), text.strip())
    return config


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Turn what goes wrong in a config file, such as a misspelt keyword, into one line that says where."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise ConfigError(f"{file}, line {line}: {type(error).__name__}: {error}") from error


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parse the "a=1,b=x" after a config's colon; each default gives the name and the type of a knob."""
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, separator, text = part.partition("=")
        if key not in defaults:
            raise ConfigError(f"config argument {key!r} is unknown; known: {', '.join(defaults)}")
        if not separator:
            text = "true"
        values[key] = _coerce_text(text, type(defaults[key]), key)
    return types.SimpleNamespace(**values)


def with_value(node: Any, key: str, text: str) -> Any:
    """A copy of a config tree in which the dotted `key` holds the value that `text` spells."""
    return _replace(node, key.split("."), text, key, type(node))


def check(node: Any) -> Any:
    """A copy of a config tree in which every field was checked against its annotation."""
    return _coerce(node, type(node), "")


def to_dict(node: Any) -> Any:
    """A JSON-ready tree; dataclasses carry their import path under "type"."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = {f.name: to_dict(getattr(node, f.name)) for f in dataclasses.fields(node)}
        return {"type": f"{type(node).__module__}.{type(node).__qualname__}", **fields}
    if isinstance(node, dict):
        return {str(k): to_dict(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [to_dict(v) for v in node]
    if isinstance(node, enum.Enum):
        return node.value
    return node


def from_dict(tree: Any) -> Any:
    """The inverse of `to_dict`. Only types of bvl itself are imported; others stay plain dicts."""
    if isinstance(tree, list):
        return tuple(from_dict(v) for v in tree)
    if not isinstance(tree, dict):
        return tree
    name = tree.get("type")
    values = {k: from_dict(v) for k, v in tree.items() if k != "type"}
    if not (isinstance(name, str) and name.startswith("bvl.")):
        return {k: from_dict(v) for k, v in tree.items()}
    module, _, cls_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), cls_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"config names the type {name}, which this version of bvl does not have") from error
    return _coerce(_build(cls, values, cls_name), cls, cls_name)


def dump(config: Config) -> str:
    """The resolved config as JSON text, with its format version."""
    return json.dumps({"format_version": FORMAT_VERSION, **to_dict(config)}, indent=2) + "\n"


def load_dump(path: Path) -> Config:
    """Read a config.json that `dump` wrote; raises ConfigError for another file."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged, or no config of a run: {error}") from error
    version = tree.pop("format_version", None) if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version {version}, this bvl reads {FORMAT_VERSION}")
    return from_dict(tree)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf of the tree that `to_dict` makes."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = ((str(i), v) for i, v in enumerate(tree))
    else:
        return {prefix: tree}
    out = {}
    for key, value in items:
        out |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return out or {prefix: tree}


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "key: old -> new" for every key that differs and may not; what `old` does not know has its default there."""
    with contextlib.suppress(ConfigError):  # of a version whose configs can no longer be read
        old = to_dict(from_dict({k: v for k, v in old.items() if k != "format_version"}))
    old, new = flatten(old), flatten(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS) and key != "format_version":
            lines.append(f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}")
    return lines


def content_hash(value: Any) -> str:
    """Short hash of a JSON-ready value, for names that stand beside a number."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _parse(text: str) -> Any:
    word = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in word:
        return word[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unknown(key: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
    hint = f"; nearest is {prefix + near[0]!r}" if near else ""
    return ConfigError(f"unknown config key {key!r}{hint} (known here: {', '.join(known)})")


def _coerce_text(text: str, hint: Any, where: str) -> Any:
    """The value that `text` spells, where the annotation `hint` says what may stand there."""
    value = _parse(text)
    try:
        return _coerce(value, hint, where)
    except ConfigError as error:
        if isinstance(value, dict | list | tuple):
            raise
        # A folder named 2024 and the choice "none" are strings, though they also spell something else.
        try:
            return _coerce(text, hint, where)
        except ConfigError:
            raise error from None


def _replace(node: Any, path: list[str], text: str, full: str, expected: Any) -> Any:
    # What is annotated as Any (model, a task ...) keeps the type of what the config file put there.
    if expected is Any and dataclasses.is_dataclass(node):
        expected = type(node)
    if not path:
        return _coerce_text(text, expected, full)
    head, rest = path[0], path[1:]
    done = full[: len(full) - len(".".join(rest)) - 1] if rest else full
    if dataclasses.is_dataclass(node):
        names = [f.name for f in dataclasses.fields(node)]
        if head not in names:
            raise _unknown(done, head, names)
        old = getattr(node, head)
        hint = typing.get_type_hints(type(node))[head]
        return _build_like(node, head, _replace(old, rest, text, full, hint), done)
    if isinstance(node, dict):
        args = typing.get_args(expected)
        hint = args[1] if len(args) == 2 else Any
        if rest and head not in node:
            raise _unknown(done, head, list(node))
        return {**node, head: _replace(node.get(head), rest, text, full, hint)}
    if isinstance(node, tuple | list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(f"{done}: there are {len(node)} entries here, numbered from 0")
        args = [a for a in typing.get_args(expected) if a is not Ellipsis]
        hint = args[0] if args else type(node[int(head)])
        items = list(node)
        items[int(head)] = _replace(items[int(head)], rest, text, full, hint)
        return tuple(items)
    options = [a for a in _members(expected) if dataclasses.is_dataclass(a)]
    if node is None and options:
        return _replace(options[0](), path, text, full, options[0])
    raise ConfigError(
        f"config key {full!r}: {done.rpartition('.')[0]!r} holds {node!r} and has no keys below it"
    )


def _build_like(node: Any, name: str, value: Any, where: str) -> Any:
    try:
        return dataclasses.replace(node, **{name: value})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            raise _unknown(f"{where}.{key}" if where else key, key, names)
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_args(hint):
        return "null" if hint is type(None) else hint.__name__
    return str(hint).replace("typing.", "")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or ConfigError. Only int -> float and list -> tuple change a value."""
    if hint is Any:
        return _coerce(value, type(value), where) if dataclasses.is_dataclass(value) else value
    members = _members(hint)
    if len(members) > 1:
        errors = []
        for member in members:
            try:
                return _coerce(value, member, where)
            except ConfigError as error:
                errors.append((member, error))
        # The message of a dataclass that was clearly meant says more than "is no A or B".
        for member, error in errors:
            if dataclasses.is_dataclass(member) and isinstance(value, dict | member):
                raise error
        raise ConfigError(f"{where}={value!r} is not {' or '.join(_name(m) for m in members)}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{where}={value!r} is not {_name(hint)}")
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            raise ConfigError(f"{wrong}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            value = _build(hint, {k: v for k, v in value.items() if k != "type"}, where)
        if not isinstance(value, hint):
            raise wrong
        hints = typing.get_type_hints(type(value))
        changed = {}
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            new = _coerce(old, hints[field.name], f"{where}.{field.name}" if where else field.name)
            if new is not old:
                changed[field.name] = new
        return dataclasses.replace(value, **changed) if changed else value
    if origin in (tuple, list) or hint in (tuple, list):
        if not isinstance(value, tuple | list):
            raise wrong
        if origin is tuple and Ellipsis not in args and args and len(args) != len(value):
            raise wrong
        item_hints = (
            [args[0]] * len(value)
            if (Ellipsis in args or len(args) == 1)
            else list(args) or [Any] * len(value)
        )
        return tuple(
            _coerce(v, h, f"{where}.{i}") for i, (v, h) in enumerate(zip(value, item_hints, strict=True))
        )
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise wrong
        item = args[1] if args else Any
        return {str(k): _coerce(v, item, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) or hint is None:
        if value is not None:
            raise wrong
        return None
    if isinstance(hint, type):
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise wrong
        return value
    raise ConfigError(f"{where}: cannot check the annotation {hint}")
