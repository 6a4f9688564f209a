"""Conversion tables: which bvl parameter is which foreign tensor. One table serves both directions.

A table is data. Names of ours are paths below params["model"] ("image/stack/block_{i}/mlp/up/kernel"), or begin with
"heads/" for parameters of tasks; `{i}` is the number of a layer, filled in by `repeat`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from einops import rearrange
from jaxtyping import Float

from bvl.convert.tensors import Tensors
from bvl.errors import ConversionError

How = Literal["same", "transpose", "patches", "convolution"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One bvl parameter and the foreign tensor, or part of a tensor, that it is.

    how: "same"; "transpose" (their matrix is [out, in]); "patches": their convolution [out, 3, p, p] is our matrix
      [(p p 3), out]; "convolution": their [out, in, p, q] is our [p, q, in, out].
    leading: axes of length 1 that theirs has in front.
    part: (k, n): ours is the k-th of n equal parts of theirs, cut along its axis `axis`.
    """

    ours: str
    theirs: str
    how: How = "same"
    leading: int = 0
    part: tuple[int, int] | None = None
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Alias:
    """A second foreign name of a tensor: on import it may be there and must then be equal; on export it is not written."""

    theirs: str
    of: str


@dataclasses.dataclass(frozen=True)
class Unread:
    """Foreign tensors, by a regular expression of their whole name, that bvl has no parameter for; `why` is reported."""

    pattern: str
    why: str


@dataclasses.dataclass(frozen=True)
class Constant:
    """A foreign tensor that is no parameter: not read on import, written with this value on export."""

    theirs: str
    value: int | float
    dtype: str = "int64"


@dataclasses.dataclass(frozen=True)
class Unwritten:
    """Parameters of ours, by a regular expression of their whole name, that theirs has no tensor for; `why` is reported.

    A model that is read back from there has them not, or anew.
    """

    pattern: str
    why: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, and what else may or must stand in the foreign file, or in our model."""

    rows: tuple[Row, ...] = ()
    aliases: tuple[Alias, ...] = ()
    unread: tuple[Unread, ...] = ()
    constants: tuple[Constant, ...] = ()
    unwritten: tuple[Unwritten, ...] = ()

    def __add__(self, other: Table) -> Table:
        return Table(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def under(self, ours: str = "", theirs: str = "") -> Table:
        """The table with a prefix before all names of ours, and one before all of theirs."""

        def moved(entry: Any) -> Any:
            changes = {"theirs": theirs + entry.theirs}
            if isinstance(entry, Row):
                changes["ours"] = ours + entry.ours
            elif isinstance(entry, Alias):
                changes["of"] = theirs + entry.of
            return dataclasses.replace(entry, **changes)

        return Table(
            tuple(map(moved, self.rows)),
            tuple(map(moved, self.aliases)),
            tuple(dataclasses.replace(u, pattern=re.escape(theirs) + u.pattern) for u in self.unread),
            tuple(map(moved, self.constants)),
            tuple(dataclasses.replace(u, pattern=re.escape(ours) + u.pattern) for u in self.unwritten),
        )

    def repeat(self, depth: int) -> Table:
        """The table once for each layer, its number in the place of `{i}`."""

        def numbered(entry: Any, i: int) -> Any:
            names = {"ours", "theirs", "of"} & {f.name for f in dataclasses.fields(entry)}
            return dataclasses.replace(entry, **{n: getattr(entry, n).replace("{i}", str(i)) for n in names})

        return Table(
            *(
                tuple(numbered(entry, i) for i in range(depth) for entry in entries)
                for entries in (self.rows, self.aliases)
            ),
            self.unread,
            tuple(numbered(entry, i) for i in range(depth) for entry in self.constants),
            self.unwritten,
        )


def table(*parts: Row | Alias | Unread | Constant | Unwritten | Iterable[Row] | Table) -> Table:
    """A table of rows, of lists of rows (`linear` and `norm` give such) and of other tables."""
    whole = Table()
    fields = {
        **{Row: "rows", Alias: "aliases", Unread: "unread", Constant: "constants"},
        Unwritten: "unwritten",
    }
    for part in parts:
        if not isinstance(part, Table):
            entries = (part,) if type(part) in fields else tuple(part)
            kinds: dict[str, tuple] = {name: () for name in fields.values()}
            for entry in entries:
                kinds[fields[type(entry)]] += (entry,)
            part = Table(**kinds)
        whole = whole + part
    return whole


def linear(ours: str, theirs: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Rows of an affine map that torch keeps as [out, in]."""
    rows = (Row(f"{ours}/kernel", f"{theirs}.weight", "transpose"),)
    return rows + ((Row(f"{ours}/bias", f"{theirs}.bias"),) if bias else ())


def norm(ours: str, theirs: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a layer norm, or without bias of an RMS norm."""
    rows = (Row(f"{ours}/scale", f"{theirs}.weight"),)
    return rows + ((Row(f"{ours}/bias", f"{theirs}.bias"),) if bias else ())


def packed(
    ours: str, names: tuple[str, ...], weight: str, bias: str | None, *, how: How = "transpose", axis: int = 0
) -> tuple[Row, ...]:
    """Rows of several maps that theirs keeps in one tensor, as queries, keys and values often are.

    axis: of their weight along which the maps stand side by side.
    """
    rows: tuple[Row, ...] = ()
    for k, name in enumerate(names):
        rows += (Row(f"{ours}/{name}/kernel", weight, how, part=(k, len(names)), axis=axis),)
        if bias is not None:
            rows += (Row(f"{ours}/{name}/bias", bias, part=(k, len(names))),)
    return rows


def _import(row: Row, theirs: np.ndarray) -> np.ndarray:
    """Our array of a whole foreign one."""
    x = theirs.reshape(theirs.shape[row.leading :])
    if row.part is not None:
        k, n = row.part
        x = np.split(x, n, axis=row.axis)[k]
    if row.how == "transpose":
        return x.T
    if row.how == "patches":
        return rearrange(x, "o c p q -> (p q c) o")
    if row.how == "convolution":
        return rearrange(x, "o i p q -> p q i o")
    return x


def _export(row: Row, ours: np.ndarray) -> np.ndarray:
    """The foreign array, or part of one, of ours, without the leading axes."""
    if row.how == "transpose":
        return ours.T
    if row.how == "patches":
        p = math.isqrt(ours.shape[0] // 3)
        return rearrange(ours, "(p q c) o -> o c p q", p=p, q=p)
    if row.how == "convolution":
        return rearrange(ours, "p q i o -> o i p q")
    return ours


def _foreign_shape(row: Row, ours: Shape) -> Shape:
    """The shape that the whole foreign tensor of a row has, where our parameter has the shape `ours`."""
    shape = list(_export(row, np.broadcast_to(np.float32(0), ours)).shape)
    if row.part is not None:
        shape[row.axis] *= row.part[1]
    return (1,) * row.leading + tuple(shape)


@dataclasses.dataclass(frozen=True)
class Converted:
    """One line of the report: a parameter of ours and the tensor of theirs."""

    ours: str
    ours_shape: Shape
    theirs: str
    theirs_shape: Shape
    how: str


def check_complete(
    table: Table, ours: Mapping[str, Shape], theirs: Mapping[str, Shape], *, where: str, partial: bool = False
) -> None:
    """Raise ConversionError, naming tensors, unless the table joins all of ours with all of theirs in fitting shapes.

    partial: our parameters without a row are allowed, since they start fresh.
    """
    rows = {row.ours: row for row in table.rows}
    if len(rows) < len(table.rows):
        raise ConversionError(f"{where}: the conversion table names a parameter of bvl twice")
    problems = [f"the model of bvl has no {name}, as which {rows[name].theirs} would be read" for name in rows.keys() - ours.keys()]  # fmt: skip
    if not partial:
        problems += [
            f"nothing in the table for bvl's {name} {ours[name]}" for name in ours.keys() - rows.keys()
        ]
    known = {row.theirs for row in table.rows}
    for name in sorted(known - theirs.keys()):
        users = [row for row in table.rows if row.theirs == name and row.ours in ours]
        shape = f" {_foreign_shape(users[0], ours[users[0].ours])}" if users else ""
        problems.append(f"tensor {name}{shape} is missing")
    extra = theirs.keys() - known - {a.theirs for a in table.aliases} - {c.theirs for c in table.constants}
    for name in sorted(extra):
        if not any(re.fullmatch(u.pattern, name) for u in table.unread):
            problems.append(f"tensor {name} {theirs[name]} has no place in this architecture")
    for row in table.rows:
        if row.ours in ours and row.theirs in theirs:
            wanted = _foreign_shape(row, ours[row.ours])
            if wanted != theirs[row.theirs]:
                problems.append(f"tensor {row.theirs} is {theirs[row.theirs]}, the config asks for {wanted}")
    problems = list(dict.fromkeys(problems))
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(f"{where}:\n  " + "\n  ".join(problems[:8]) + more)


def to_ours(
    table: Table, tensors: Tensors, shapes: Mapping[str, Shape], *, where: str, partial: bool = False
) -> tuple[dict[str, Float[np.ndarray, "*shape"]], list[Converted]]:
    """(our parameters by name, the report) from foreign tensors, in float32.

    shapes: of all our parameters. Raises ConversionError as `check_complete` does, and for unequal aliases.
    """
    check_complete(table, shapes, tensors.shapes, where=where, partial=partial)
    for alias in table.aliases:
        if alias.theirs in tensors.shapes and not np.array_equal(
            tensors.load(alias.theirs), tensors.load(alias.of)
        ):
            raise ConversionError(
                f"{where}: {alias.theirs} differs from {alias.of}, with which it should be one tensor"
            )
    params, report, held = {}, [], (None, None)
    for row in table.rows:
        if held[0] != row.theirs:  # parts of one tensor follow each other
            held = (row.theirs, tensors.load(row.theirs).astype(np.float32, copy=False))
        params[row.ours] = np.asarray(_import(row, held[1]), order="C")
        report.append(_converted(row, shapes[row.ours], held[1].shape))
    return params, report


def to_theirs(
    table: Table, params: Mapping[str, np.ndarray], *, where: str
) -> tuple[dict[str, np.ndarray], list[Converted]]:
    """(foreign tensors by name, the report) from our parameters by name.

    Raises ConversionError for a parameter that the table does not know, nor leaves out.
    """
    shapes = {name: tuple(x.shape) for name, x in params.items()}
    parts: dict[str, list[tuple[Row, np.ndarray]]] = {}
    for row in table.rows:
        if row.ours not in params:
            raise ConversionError(
                f"{where}: the model has no parameter {row.ours} for the tensor {row.theirs}"
            )
        parts.setdefault(row.theirs, []).append((row, _export(row, np.asarray(params[row.ours]))))
    left = sorted(shapes.keys() - {row.ours for row in table.rows} - unwritten_params(table, shapes).keys())
    if left:
        raise ConversionError(f"{where}: no tensor there for {', '.join(left[:8])}")
    tensors, report = {}, []
    for name, found in parts.items():
        found.sort(key=lambda item: item[0].part or (0, 1))
        row = found[0][0]
        if row.part is not None and [r.part[0] for r, _ in found] != list(range(row.part[1])):
            raise ConversionError(f"{where}: the conversion table has not all {row.part[1]} parts of {name}")
        x = found[0][1] if row.part is None else np.concatenate([x for _, x in found], axis=row.axis)
        tensors[name] = np.asarray(x.reshape((1,) * row.leading + x.shape), np.float32, order="C")
        report += [_converted(r, shapes[r.ours], tensors[name].shape) for r, _ in found]
    for constant in table.constants:
        tensors[constant.theirs] = np.asarray(constant.value, constant.dtype)
    return tensors, report


def unwritten_params(table: Table, names: Iterable[str]) -> dict[str, str]:
    """Our parameter -> why it is not written, for those of `names` that the table leaves out."""
    rows = {row.ours for row in table.rows}
    return {
        name: u.why
        for name in sorted(set(names) - rows)
        for u in table.unwritten
        if re.fullmatch(u.pattern, name)
    }


def _converted(row: Row, ours: Shape, theirs: Shape) -> Converted:
    how = [] if row.how == "same" else [row.how]
    how += [f"part {row.part[0] + 1} of {row.part[1]}"] if row.part else []
    return Converted(row.ours, tuple(ours), row.theirs, tuple(theirs), ", ".join(how) or "same")


_BLOCK = re.compile(r"^(.*)/block_(\d+)/(.*)$")


def split_layers(
    flat: Mapping[str, Any], take: Callable[[Any, int], Any] = lambda x, i: x[i]
) -> dict[str, Any]:
    """Parameters by name with every scanned stack ("stack/blocks/...", layers first) as single blocks.

    take: (array or shape of the stack, layer) -> that of the layer.
    """
    out: dict[str, Any] = {}
    for name, x in flat.items():
        if "/blocks/" not in name:
            out[name] = x
            continue
        front, _, rest = name.partition("/blocks/")
        depth = x[0] if isinstance(x, tuple) else len(x)
        out |= {f"{front}/block_{i}/{rest}": take(x, i) for i in range(depth)}
    return out


def join_layers(flat: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The inverse of `split_layers`: stacks for those of the `names` that are scanned."""
    stacked = {name for name in names if "/blocks/" in name}
    out, layers = {}, {}
    for name, x in flat.items():
        found = _BLOCK.match(name)
        whole = f"{found[1]}/blocks/{found[3]}" if found else name
        if whole in stacked:
            layers.setdefault(whole, {})[int(found[2])] = x
        else:
            out[name] = x
    return out | {name: np.stack([of[i] for i in sorted(of)]) for name, of in layers.items()}


def flat_params(params: Any) -> dict[str, Any]:
    """Parameters {"model": ..., "heads": ...} by the names that tables use."""
    out: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}/{key}" if prefix else key, value)
        else:
            out[prefix] = node

    walk("", params["model"])
    if params.get("heads"):
        walk("heads", params["heads"])
    return out


def nested_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat_params`."""
    tree: dict[str, Any] = {"model": {}, "heads": {}}
    for name, x in flat.items():
        node = tree if name.startswith("heads/") else tree["model"]
        *parents, leaf = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = x
    return tree
