"""What a compiled step says to other devices: its collectives, read from the HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"s64": 8, "u64": 8, "f64": 8}

HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: of KINDS.
        size: devices that take part together.
        stride: between the first two of them, by number: 1 where they are neighbours.
        received: bytes that reach a device in one run of it, by a ring: (size - 1) / size of what is gathered or
            scattered, twice that for an all-reduce; all that is permuted.
        runs: times that it runs in a step (trips of the loops around it).
        text: the instruction.
    """

    kind: str
    size: int
    stride: int
    received: float
    runs: int
    text: str

    @property
    def bytes(self) -> float:
        return self.runs * self.received


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled module, given as its text (``compiled.as_text()``)."""
    computations, entry = _computations(hlo)
    found = []

    def visit(name: str, runs: int) -> None:
        for line in computations.get(name, ()):
            collective = _collective(line, runs)
            if collective is not None:
                found.append(collective)
                continue
            trips = TRIPS.search(line)
            for called in _called(line):
                inside = int(trips[1]) if trips and f"body=%{called}" in line else 1
                visit(called, runs * inside)

    visit(entry, 1)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _called(line: str) -> Iterator[str]:
    if " = " not in line:
        return
    yield from CALLED.findall(line)
    for branches in BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _collective(line: str, runs: int) -> Collective | None:
    match = INSTRUCTION.search(line)
    if match is None:
        return None
    result, kind, rest = match.groups()
    size, stride = _group(rest, kind)
    arrays = [WIDTHS[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in ARRAY.findall(result)]
    # An asynchronous start has its operands among its results, and those of a permute two counters.
    if f"{kind}-start(" in line and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    received = (
        sum(arrays)
        * {
            "all-gather": (size - 1) / size,
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": size - 1,
            "all-to-all": (size - 1) / size,
            "collective-permute": 1,
        }[kind]
    )
    return Collective(kind, size, stride, received, runs, line.strip())


def _group(rest: str, kind: str) -> tuple[int, int]:
    """Devices in a group, and the step from the first to the second."""
    if kind == "collective-permute":
        first, second = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest).groups()
        return 2, abs(int(second) - int(first))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        group = [int(n) for n in listed[1].split(",")]
        return len(group), (group[1] - group[0] if len(group) > 1 else 1)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inside = re.findall(r"'([^']+)'", named[2])
        after = list(axes)[max(list(axes).index(name) for name in inside) + 1 :]
        return math.prod(axes[name] for name in inside), math.prod(axes[name] for name in after)
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if tiled is None:
        raise ValueError(f"cannot read the replica groups of {rest[:200]}")
    groups, dims, order = ([int(n) for n in part.split(",")] if part else None for part in tiled.groups())
    size = groups[-1]
    if order is None:
        return size, 1
    return size, math.prod(dims[order[-1] + 1 :])
