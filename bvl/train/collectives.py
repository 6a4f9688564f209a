"""What a compiled program sends between devices, read from the text of its optimised HLO."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "bf16": 16, "f16": 16}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array of HLO, such as f32[24,1024]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(
            re.sub(r"\D.*", "", self.dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
        )
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. types: of the result, several for a tuple. calls: attribute -> the computation it names."""

    name: str
    opcode: str
    types: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    calls: dict[str, str]
    text: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.types)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices. bytes: of the larger of what a device gives and gets, for one time of `times`.

    loop: name of the loop's body that it stands in, "" outside of all loops.
    """

    kind: str
    types: tuple[ArrayType, ...]
    bytes: int
    times: int
    loop: str
    name: str
    group_size: int

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.times


class Program:
    """An optimised HLO module: its computations by name, and how often each runs.

    A loop counts by its known number of turns, of which XLA writes the text; where it is not known, once. Of a
    conditional every branch counts.
    """

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, list[Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif current is not None and _INSTRUCTION.match(line):
                current.append(_instruction(line))
        if not entry:
            raise ValueError("no text of an HLO module: there is no ENTRY")
        self.times: dict[str, int] = collections.defaultdict(int)
        self.loop_of: dict[str, str] = {}
        self._visit(entry, 1, "")

    def _visit(self, name: str, times: int, loop: str) -> None:
        self.times[name] += times
        self.loop_of[name] = loop
        for instruction in self.computations[name]:
            for attribute, called in instruction.calls.items():
                if attribute == "body":
                    trips = _TRIPS.search(instruction.text)
                    self._visit(called, times * (int(trips[1]) if trips else 1), called)
                elif instruction.opcode not in KINDS:
                    self._visit(called, times, loop)

    def instructions(self) -> list[tuple[str, Instruction]]:
        """(computation, instruction) of all that runs."""
        return [(name, i) for name in self.times for i in self.computations[name]]

    def collectives(self) -> list[Collective]:
        """Every transfer between devices, in the order of the text."""
        found = []
        for name, instruction in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            types = instruction.types
            if instruction.opcode != kind and kind != "all-reduce":
                types = types[len(types) // 2 :]  # A started transfer gives its operands and its results.
            by_name = {i.name: i for i in self.computations[name]}
            given = sum(by_name[operand].bytes for operand in instruction.operands)
            found.append(
                Collective(
                    kind=kind,
                    types=types,
                    bytes=max(sum(array.bytes for array in types), given),
                    times=self.times[name],
                    loop=self.loop_of[name],
                    name=instruction.name,
                    group_size=_group_size(instruction.text),
                )
            )
        # Groups of one device move nothing.
        return [c for c in found if c.group_size != 1]

    def bytes_by_kind(self) -> dict[str, int]:
        """kind -> bytes of all its transfers, for one device."""
        totals: dict[str, int] = collections.Counter()
        for collective in self.collectives():
            totals[collective.kind] += collective.total_bytes
        return dict(totals)

    def gathered_at_once(self) -> dict[str, int]:
        """computation -> most bytes of all-gathered arrays, and of their copies, that are alive there at once.

        The text is in the order of execution, as compiled programs are.
        """
        return {name: peak for name in self.times if (peak := _peak_gathered(self.computations[name]))}

    def arrays(self) -> set[ArrayType]:
        """The types of all arrays that exist at some time, inside fusions too."""
        return {array for _, instruction in self.instructions() for array in instruction.types}


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands, attributes = rest[:end], rest[end + 1 :]
    calls = dict(
        re.findall(
            r"(condition|body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", attributes
        )
    )
    if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        calls |= {f"branch_{i}": name.strip(" %") for i, name in enumerate(branches[1].split(","))}
    return Instruction(
        name=found[2],
        opcode=opcode,
        types=tuple(
            ArrayType(dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in _ARRAY.findall(types)
            if dtype not in ("token", "opaque")
        ),
        operands=tuple(_NAME.findall(operands)),
        calls=calls,
        text=line,
        is_root=bool(found[1]),
    )


def _peak_gathered(body: list[Instruction]) -> int:
    memory: dict[str, str] = {}  # an array -> the array whose memory it is
    spans: dict[str, list[int]] = {}  # an array with memory of its own -> bytes, first and last place
    made: dict[str, list[int]] = {}
    for place, instruction in enumerate(body):
        sources = [memory[operand] for operand in instruction.operands if operand in memory]
        for source in sources:
            spans[source][2] = place
        dims = _dims(instruction)
        if instruction.opcode == "bitcast" and sources:
            memory[instruction.name] = sources[0]
        elif instruction.opcode.startswith("all-gather") or any(dims == made[s] for s in sources):
            memory[instruction.name] = instruction.name
            spans[instruction.name] = [instruction.bytes, place, place]
            made[instruction.name] = dims
    peaks = [sum(size for size, a, b in spans.values() if a <= place <= b) for _, place, _ in spans.values()]
    return max(peaks, default=0)


def _dims(instruction: Instruction) -> list[int]:
    """Sizes of an array's axes in rising order, without those of size 1: transposing and casting leave them."""
    return sorted(n for array in instruction.types[:1] for n in array.shape if n > 1)


def _closing(text: str) -> int:
    """Place of the parenthesis that closes the one at the beginning."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    raise ValueError(f"HLO with an open parenthesis: {text[:100]}")


def _group_size(text: str) -> int:
    """Devices of one group, 0 where the text does not say."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    return 0
