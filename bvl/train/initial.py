"""Parameters that a run takes over from other models: the config's `init_from`, `init_include` and `init_exclude`.

Several models are laid over each other in order, part by part: a part (the image tower with its projection, the text
tower with its projection, the decoder, temperature and bias, a region module) is that of the last model that has it.
A part that no model has starts fresh. Within a part that is taken every parameter must be there and fit, unless one
of the regular expressions leaves it out. Heads belong to the tasks of their run: they are taken only where a
regular expression of `init_include` names them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from bvl.config import Config, load_dump
from bvl.data.text import Tokenizer
from bvl.errors import CheckpointError, ConfigError
from bvl.runs import Components, RunFolder, load_components, write_atomic
from bvl.train.fitting import fitted
from bvl.train.parameters import SEES, map_by_name, named_leaves

logger = logging.getLogger(__name__)

FILE = "init.json"
# Parts with a row for each token; the tokenizer is that of the model they come from.
VOCABULARIES = ("text", "decoder")
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Start:
    """The models of `init_from`, opened, and the tokenizer that their token embeddings are for (None: they have none).

    fixed: the vocabulary of some model is taken, so that no other tokenizer can be used.
    """

    sources: dict[str, Components]
    tokenizer: Tokenizer | None
    tokenizer_of: str | None
    fixed: bool


@dataclasses.dataclass
class Diff:
    """What came of every parameter: loaded: name -> model; skipped: (name, model, why); new: name -> why."""

    loaded: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    new: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """A table of counts by part, then the names of what was skipped or is new, and what was resized."""
        counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        for kind, names in (
            ("loaded", self.loaded),
            ("skipped", [name for name, _, _ in self.skipped]),
            ("new", self.new),
        ):
            for name in names:
                counts[part_of(name)][kind] += 1
        lines = [f"{'part':<20}{'loaded':>8}{'skipped':>8}{'new':>8}"]
        for part, row in counts.items():
            sources = dict.fromkeys(s for n, s in self.loaded.items() if part_of(n) == part)
            origin = f"  from {', '.join(sources)}" if sources else ""
            lines.append(f"{part:<20}{row['loaded']:>8}{row['skipped']:>8}{row['new']:>8}{origin}")
        reasons: dict[str, list[str]] = collections.defaultdict(list)
        for name, source, why in self.skipped:
            reasons[f"skipped of {source}, {why}"].append(name)
        for name, why in self.new.items():
            reasons[f"new, {why}"].append(name)
        lines += [f"{reason}: {_some(names)}" for reason, names in reasons.items()]
        return lines + self.notes

    def write(self, folder: Path) -> None:
        """Every name, into init.json of a run folder."""
        tree = {
            "loaded": self.loaded,
            "skipped": [{"name": n, "of": source, "why": why} for n, source, why in self.skipped],
            "new": self.new,
            "notes": self.notes,
        }
        write_atomic(folder / FILE, json.dumps(tree, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which names the config's regular expressions let through; raises ConfigError for one that matches nothing."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def reason(self, name: str) -> str | None:
        """Why a parameter is left out, None where it is not."""
        for pattern in self.exclude:
            if re.search(pattern, name):
                return f"init_exclude {pattern!r}"
        if self.include and not self.included(name):
            return "not in init_include"
        return None

    def included(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.include)

    def check(self, names: Iterable[str]) -> None:
        names = list(dict.fromkeys(names))
        for option, patterns in (("init_include", self.include), ("init_exclude", self.exclude)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in names):
                    plain = re.sub(r"[^\w/]+", "", pattern)
                    near = sorted(names, key=lambda n: -difflib.SequenceMatcher(None, plain, n).ratio())[:3]
                    raise ConfigError(
                        f"{option}: {pattern!r} matches no parameter; nearest are {', '.join(near)}"
                    )


def part_of(name: str) -> str:
    """The part that a parameter belongs to: "image" and "text" with their projections, "logits", "heads/<task>" ..."""
    parts = name.split("/")
    if parts[0] == "heads":
        return "/".join(parts[:2])
    if parts[1] in ("log_scale", "logit_bias"):
        return "logits"
    return parts[1].removesuffix("_projection")


def open_start(config: Config) -> Start | None:
    """The models of the config's `init_from`, loaded; None where it names none.

    Raises ConfigError where two vocabularies would be taken, or where there are regular expressions and no models;
    RunFolderError, CheckpointError or ConversionError for what is no model.
    """
    specs = config.init_sources
    if not specs:
        if config.init_include or config.init_exclude:
            raise ConfigError("init_include and init_exclude choose from the models of init_from: name one")
        return None
    sources = {spec: load_components(spec, use_ema=False) for spec in specs}
    return start_of(config, sources)


def start_of(config: Config, sources: dict[str, Components]) -> Start:
    """What a run of `config` starts from, given its models by name."""
    choice = _Choice(config.init_include, config.init_exclude)
    own = {part for part in VOCABULARIES if getattr(config.model, part) is not None}
    # part -> the last model that has it.
    owners = {p: spec for spec, c in sources.items() for p in VOCABULARIES if p in c.params["model"]}
    taken = {
        part: spec
        for part, spec in owners.items()
        if part in own and choice.reason(f"model/{part}/token_embed") is None
    }
    controls = config.data.controls.tokens()
    hashes = {spec: sources[spec].tokenizer.with_tokens(controls).hash for spec in taken.values()}
    if len(set(hashes.values())) > 1:
        (a, first), (b, second) = list(taken.items())[:2]
        raise ConfigError(
            f"init_from: the {a} would read the vocabulary of {first} and the {b} that of {second}, which differ; "
            f"leave one out, for example init_exclude=('^model/{b}/',)"
        )
    # The model that has the controls already, where only one has.
    of = max(taken.values(), key=lambda s: sources[s].tokenizer.vocab_size, default=None)
    spec = of if of is not None else next(reversed(owners.values()), None)
    tokenizer = None if spec is None else sources[spec].tokenizer
    return Start(sources, tokenizer, spec, fixed=of is not None)


def settled_config(config: Config, run: RunFolder) -> Config | None:
    """The config that a run goes on from: its own where it has a checkpoint, else that of `resume_from`."""
    folder = run if run.has_checkpoint() else RunFolder(config.resume_from) if config.resume_from else None
    if folder is None or not folder.config.is_file():
        return None
    with contextlib.suppress(ConfigError):  # of a version whose configs can no longer be read
        return load_dump(folder.config)


def with_tokenizer_options(config: Config, start: Start | None, settled: Config | None) -> Config:
    """The config with what belongs to the tokenizer that is taken over: names of its special tokens, rows.

    settled: the config that the run was begun with, which has them already.
    """
    options = config.data.tokenizer
    if settled is not None:
        theirs = settled.data.tokenizer
    elif start is not None and start.tokenizer_of is not None and (start.fixed or options.path is None):
        theirs = start.sources[start.tokenizer_of].config.data.tokenizer
    else:
        return config
    names = ("start", "end", "pad", "embedding_rows")
    missing = {n: getattr(theirs, n) for n in names if getattr(options, n) is None}
    options = dataclasses.replace(options, **missing)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=options))


def initial_params(start: Start, config: Config, fresh: Any, mesh: Mesh) -> tuple[Any, Diff]:
    """(the parameters with all that is taken over, what came of each): `fresh` = {"model": ..., "heads": ...}.

    Raises CheckpointError naming the first parameters of a part that are missing or have another shape, and
    ConfigError for a regular expression that matches nothing.
    """
    choice = _Choice(config.init_include, config.init_exclude)
    own = named_leaves(fresh)
    given = {spec: named_leaves(components.params) for spec, components in start.sources.items()}
    choice.check([*own, *(name for names in given.values() for name in names)])
    own_parts, given_parts = _parts(own), {spec: _parts(names) for spec, names in given.items()}
    owners: dict[str, str] = {}
    for spec, parts in given_parts.items():
        meet = "image" in parts.values() and any(n.startswith("model/text") for n in parts)
        # A temperature without two towers that meet was never trained.
        owners |= {part: spec for part in parts.values() if part != "logits" or meet}
    diff, values, wrong = Diff(), {}, collections.defaultdict(dict)
    for spec, names in given.items():
        for name, value in names.items():
            part = given_parts[spec][name]
            why = choice.reason(name)
            if part not in own_parts.values():
                why = f"this run has no {part}"
            elif part not in owners:
                why = "two towers never met there"
            elif owners[part] != spec:
                why = f"{owners[part]} has the {part} too"
            elif part.startswith("heads/") and not choice.included(name):
                why = "heads are of the tasks of that run (init_include takes them)"
            if why is not None:
                diff.skipped.append((name, spec, why))
                continue
            if name in own:
                there = start.sources[spec].config
                value = fitted(name, value, own[name], there, config, mesh, diff.notes.append)
            if name not in own or value.shape != own[name].shape:
                wrong[spec][name] = (tuple(value.shape), _shape(own.get(name)))
                continue
            values[name], diff.loaded[name] = value.astype(own[name].dtype), spec
    for name in own.keys() - values.keys():
        part = own_parts[name]
        spec = owners.get(part)
        if spec is None:
            diff.new[name] = "no model of init_from has it"
        elif (why := choice.reason(name)) is not None:
            diff.new[name] = why
        elif part.startswith("heads/") and not choice.included(name):
            diff.new[name] = "heads are of the tasks of this run"
        elif "_projection/" in name and not _has_module(given[spec], name):
            diff.new[name] = f"{spec} has no projection"
        elif re.match(SEES, name) and start.sources[spec].config.model.image is None:
            diff.new[name] = f"{spec} reads no images"
        elif name not in wrong[spec]:
            wrong[spec][name] = ("absent", _shape(own[name]))
    diff.new = dict(sorted(diff.new.items()))
    for spec, found in wrong.items():
        if not found:
            continue
        shown = sorted(found.items())[:_SHOWN]
        lines = [f"  {name}: there {there}, here {here}" for name, (there, here) in shown]
        raise CheckpointError(
            f"init_from={spec}: {len(found)} arrays differ from those of this config:\n"
            + "\n".join(lines)
            + "\nset the model's options to those of that model, or leave them out by init_exclude"
        )
    return map_by_name(lambda name, x: values.get(name, x), fresh), diff


def warn_of_untrained(diff: Diff, trains: Callable[[str], bool]) -> None:
    """Say which fresh parameters the run never trains."""
    names = [name for name in diff.new if not trains(name)]
    if names:
        logger.warning(
            "new parameters that are not trained (optim.freeze, optim.lora.train): %s", _some(names)
        )


def _parts(names: Iterable[str]) -> dict[str, str]:
    """name -> part of a whole model; without a text tower its projection belongs to the decoder, which embeds texts."""
    names = list(names)
    towers = any(name.startswith("model/text/") for name in names)
    return {n: "decoder" if part_of(n) == "text" and not towers else part_of(n) for n in names}


def _has_module(names: Iterable[str], name: str) -> bool:
    """Whether a model has anything of the module, below the model, that a parameter is of."""
    module = "/".join(name.split("/")[:2]) + "/"
    return any(other.startswith(module) for other in names)


def _shape(x: Any) -> Any:
    return "absent" if x is None else tuple(x.shape)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
