"""parity.json of a conversion, and the table of it that is printed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from bvl.convert.inputs_parity import InputsParity
from bvl.convert.parity import Difference, Tolerance
from bvl.convert.table import Converted

# Numbers of layers in names, which are folded where all layers are alike.
_NUMBER = re.compile(r"(?<=[./])\d+(?=[./]|$)|(?<=block_)\d+")
PACKAGES = ("bvl", "jax", "flax", "torch", "open_clip_torch", "transformers", "timm")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did and how far the result lies from its source.

    unread: tensors of the source without a counterpart -> why. differences: None where nothing was checked.
    roundings: what the other library's transform of images rounds otherwise, a sentence each.
    """

    source: str
    target: str
    family: str
    converted: Sequence[Converted]
    unread: Mapping[str, str]
    differences: Sequence[Difference] | None
    inputs: InputsParity | None
    tolerance: Tolerance
    roundings: Sequence[str] = ()

    @property
    def first_departure(self) -> Difference | None:
        """The first layer or output beyond the tolerance."""
        return next((d for d in self.differences or () if not d.within), None)

    @property
    def passed(self) -> bool:
        """False also where nothing was checked."""
        return (
            bool(self.differences)
            and self.first_departure is None
            and (self.inputs is None or self.inputs.within)
        )

    def largest(self) -> dict[str, float]:
        """Largest absolute difference of embeddings, and largest relative one of layers, by tower; of a class with
        methods that of each method, of written texts the share of unequal ones."""
        out: dict[str, float] = {}
        for d in self.differences or ():
            if d.tower == "method":
                key, value = d.ours, d.absolute if d.ours.startswith("embed") else d.relative
            elif d.ours == "embed":
                key, value = f"{d.tower}/embed", d.absolute
            else:
                key, value = f"{d.tower}/{'logits' if d.ours == 'logits' else 'layers'}", d.relative
            known = out.get(key, 0.0)
            # Not max(): a difference that is no number must not vanish.
            out[key] = known if math.isnan(known) or value <= known else value
        return out

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json."""
        first = self.first_departure
        return {
            "source": self.source,
            "target": self.target,
            "family": self.family,
            "checked": self.differences is not None,
            "passed": self.passed,
            "tolerance": dataclasses.asdict(self.tolerance),
            "first_departure": None if first is None else _valid_json(dataclasses.asdict(first)),
            "largest": _valid_json(self.largest()),
            "inputs": None if self.inputs is None else dataclasses.asdict(self.inputs),
            "roundings": list(self.roundings),
            "differences": [_valid_json(dataclasses.asdict(d)) for d in self.differences or ()],
            "tensors": [dataclasses.asdict(c) for c in self.converted],
            "unread": dict(self.unread),
            "versions": _versions(),
        }

    def lines(self) -> list[str]:
        """The report as it is printed."""
        out = [f"{self.source} -> {self.target} ({self.family})", ""]
        out += _table(("theirs", "shape", "ours", "shape", "how", "x"), _folded(self.converted))
        for names, why in _folded_unread(self.unread):
            out.append(f"not read: {names} ({why})")
        out.append("")
        if self.differences is None:
            return [*out, "NOT CHECKED (--no-check): nobody has compared the outputs of the two models"]
        rows = [
            (d.tower, d.probe, d.ours, f"{d.absolute:.1e}", f"{d.relative:.1e}", "" if d.within else "BEYOND")
            for d in self.differences
        ]
        out += _table(("tower", "probe", "layer or output", "absolute", "relative", ""), rows)
        out += _input_lines(self.inputs)
        out += [f"note: {sentence}" for sentence in self.roundings]
        first = self.first_departure
        if first is not None:
            out.append(
                f"FAILED: the first that departs is {first.tower}: {first.ours}"
                f"{f' ({first.theirs})' if first.theirs else ''}, absolute {first.absolute:.1e}, relative "
                f"{first.relative:.1e} (tolerance: {self.tolerance.embed:.0e} of embeddings, "
                f"{self.tolerance.relative:.0e} relative)"
            )
        elif not self.passed:
            out.append("FAILED: the models agree, but what they are given does not (see pixels, tokens)")
        else:
            out.append(f"passed: {', '.join(f'{k} {v:.1e}' for k, v in self.largest().items())}")
        return out


def _valid_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: their names instead."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _input_lines(inputs: InputsParity | None) -> list[str]:
    if inputs is None:
        return []
    out = []
    if inputs.grey_levels is not None:
        out.append(f"pixels: {inputs.grey_levels:g} grey level(s) at most (allowed: 1)")
    if inputs.texts is not None:
        out.append(
            "tokens: equal"
            if not inputs.texts
            else f"tokens: DIFFERENT ids for {', '.join(repr(text[:40]) for text in inputs.texts)}"
        )
    return out + [f"{part}: not compared ({why})" for part, why in inputs.why.items()]


def _folded(converted: Iterable[Converted]) -> list[tuple[str, ...]]:
    """Rows of the table; layers that differ in their number alone are one row."""
    counts: dict[tuple[str, ...], int] = {}
    for c in converted:
        key = (
            _NUMBER.sub("*", c.theirs),
            "x".join(map(str, c.theirs_shape)),
            re.sub(r"_\d+(?=/|_)", "_*", c.ours),
            "x".join(map(str, c.ours_shape)),
            c.how,
        )
        counts[key] = counts.get(key, 0) + 1
    return [(*key, str(count)) for key, count in counts.items()]


def _folded_unread(unread: Mapping[str, str]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((_NUMBER.sub("*", name), why) for name, why in unread.items()))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
