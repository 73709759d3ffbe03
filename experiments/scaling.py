"""What training on 1 to 64 H100 or H200 GPUs holds, sends and takes: compiled for them, with none of them here.

The real training step, Hopper kernels inside, is compiled for each mesh by XLA's GPU compiler (it needs the cuda extra
and no GPU). Memory and collectives are read from what it made; the step's time is a model, whose assumptions are the
settings in the results file. With no arguments: every row that results/scaling.json has not got yet, then the table
and the plot. --only MODEL,LENGTH,GPUS,... compiles a few.
"""

import dataclasses
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.experimental import topologies

from collectives import Collective, collectives
from glax.data import DataConfig
from glax.errors import UserError, exit_code
from glax.models import PRESETS
from glax.training import MeshConfig, TrainConfig
from glax.training.loop import plan_and_trace
from glax.training.sharding import make_mesh, use_mesh
from results_file import ResultsFile, Row, plot

TARGET = Path(__file__).parents[1] / "tests" / "kernels" / "gla" / "h200.txtpb"
HOST = 8
MEMORY = {"H100": 80e9, "H200": 141e9}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the modelled step time stands on."""

    peak_flops: float = 989e12
    """Dense bf16 of an H100 or H200 (data sheet)."""

    matmul_efficiency: float = 0.45
    """Share of it that a device reaches while it computes, everything but communication included."""

    nvlink: float = 360e9
    """Bytes per second and direction within a host: 80% of NVLink 4's 450e9."""

    network: float = 40e9
    """Bytes per second and GPU between hosts: 80% of one 400 Gb/s adapter for each."""

    latency: float = 20e-6
    """Seconds of each collective, whatever its size."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a model, its length, and how many GPUs share how many rows."""

    model: str
    length: int
    gpus: int
    rows: int
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def name(self) -> str:
        return f"{self.model},{self.length},{self.gpus}"


K, M = 1024, 1024 * 1024
# 32 K tokens for each GPU where the length lets it: weak scaling is the rows of one model and length.
CASES = (
    Case("gla-340m", 2 * K, 1, 16),
    Case("gla-340m", 2 * K, 8, 128, fsdp=8),
    Case("gla-340m", 2 * K, 64, 1024, fsdp=64),
    Case("gla-340m", 32 * K, 8, 8, fsdp=8),
    Case("gla-340m", 256 * K, 1, 1),
    Case("gla-340m", 256 * K, 8, 1, sequence=8),
    Case("gla-340m", M, 8, 1, sequence=8),
    Case("gla-340m", M, 64, 2, fsdp=2, sequence=32),
    Case("gla-1.3b", 2 * K, 1, 16),
    Case("gla-1.3b", 2 * K, 8, 128, fsdp=8),
    Case("gla-1.3b", 2 * K, 64, 1024, fsdp=64),
    Case("gla-1.3b", 32 * K, 8, 8, fsdp=8),
    Case("gla-1.3b", M, 8, 1, sequence=8),
    Case("gla-1.3b", M, 64, 2, fsdp=2, sequence=32),
    Case("gla-7b", 2 * K, 1, 16),
    Case("gla-7b", 2 * K, 8, 128, fsdp=8),
    Case("gla-7b", 2 * K, 64, 1024, fsdp=64),
    Case("gla-7b", 32 * K, 64, 64, fsdp=64),
    Case("gla-7b", M, 64, 2, fsdp=2, sequence=32),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    results: Path = Path(__file__).parent / "results" / "scaling.json"
    """JSON of all rows; the table (.md) and the plot (.png) go beside it."""

    only: tuple[str, ...] = ()
    """Rows to compile, as MODEL,LENGTH,GPUS. None given: all that are missing."""

    assumptions: Assumptions = dataclasses.field(default_factory=Assumptions)
    """Of the modelled time."""


def train_config(case: Case) -> TrainConfig:
    model = dataclasses.replace(PRESETS[case.model], remat="full", implementation="mosaic_gpu")
    mesh = MeshConfig(fsdp=case.fsdp, sequence=case.sequence, tensor=case.tensor)
    return TrainConfig(model, DataConfig(sequence_length=case.length, batch_size=case.rows), mesh=mesh)


def compile_case(case: Case, devices: list) -> dict[str, Any]:
    """Memory per device, and what it receives by kind of collective, of the compiled step."""
    config = train_config(case)
    mesh = make_mesh(config.mesh, devices[: case.gpus])
    started = time.monotonic()
    with use_mesh(mesh):
        _, lowered = plan_and_trace(config, mesh, 1)
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    found = collectives(compiled.as_text())
    kinds = Counter()
    for collective in found:
        kinds[f"{collective.kind}, {'hosts' if crosses_hosts(collective) else 'host'}"] += collective.bytes
    return {
        "state_bytes": memory.argument_size_in_bytes,
        "memory_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "received_bytes": dict(sorted(kinds.items())),
        "collectives": sum(collective.runs for collective in found),
        "compile_seconds": time.monotonic() - started,
    }


def crosses_hosts(collective: Collective) -> bool:
    """Whether a group of it is larger than a host, or its members are on several."""
    return (collective.size - 1) * collective.stride >= HOST


def modelled(case: Case, row: Row, assumed: Assumptions) -> dict[str, float]:
    """Seconds of a step, and MFU, if communication hid behind nothing or behind everything.

    FLOPs are those of the model's mathematics, forward and backward; the forward pass that remat repeats takes time
    but does not count for MFU.
    """
    flops = PRESETS[case.model].flops_per_token(case.length) * case.length * case.rows / case.gpus
    compute = flops * (4 / 3) / (assumed.peak_flops * assumed.matmul_efficiency)
    within = sum(size for kind, size in row["received_bytes"].items() if kind.endswith("host"))
    across = sum(row["received_bytes"].values()) - within
    sent = within / assumed.nvlink + across / assumed.network + row["collectives"] * assumed.latency
    longest, shortest = compute + sent, max(compute, sent)
    return {
        "flops": flops,
        "compute_seconds": compute,
        "communication_seconds": sent,
        "seconds": longest,
        "seconds_overlapped": shortest,
        "mfu": flops / longest / assumed.peak_flops,
        "mfu_overlapped": flops / shortest / assumed.peak_flops,
    }


def table(rows: list[Row], assumed: Assumptions) -> str:
    """All rows, and the assumptions under them, as Markdown."""
    lines = [
        "| model | length | GPUs | mesh | tokens/GPU | GB/GPU | fits H100, H200 | GB received (host, hosts) | "
        "step s | MFU | weak scaling |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        within = sum(size for kind, size in row["received_bytes"].items() if kind.endswith(" host"))
        across = sum(size for kind, size in row["received_bytes"].items() if kind.endswith(" hosts"))
        mesh = " x ".join(f"{axis} {row[axis]}" for axis in ("fsdp", "sequence", "tensor") if row[axis] > 1) or "1"
        fits = ", ".join("yes" if row["memory_bytes"] <= memory else "**no**" for memory in MEMORY.values())
        efficiency = efficiency_of(row, rows)
        lines.append(
            f"| {row['model']} | {row['length']:,} | {row['gpus']} | {mesh} | "
            f"{row['length'] * row['rows'] // row['gpus']:,} | {row['memory_bytes'] / 1e9:.1f} | {fits} | "
            f"{within / 1e9:.2f}, {across / 1e9:.2f} | {row['seconds_overlapped']:.3f} to {row['seconds']:.3f} | "
            f"{100 * row['mfu']:.0f} to {100 * row['mfu_overlapped']:.0f}% | "
            f"{'' if efficiency is None else f'{100 * efficiency[0]:.0f} to {100 * efficiency[1]:.0f}%'} |"
        )
    described = "; ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(assumed).items())
    return "\n".join([
        "# Training on many GPUs: compiled for them, none of them here",
        "",
        *lines,
        "",
        "Memory, bytes and collectives are those of the step that XLA compiled for that mesh (bf16, full remat, Hopper "
        "kernels, AdamW with float32 state, one microbatch). Step time and MFU are modelled, from communication hidden "
        "completely to not at all; weak scaling is against one GPU with as many tokens. A host is eight GPUs.",
        "",
        f"Assumed: {described}.",
        "",
    ])  # fmt: skip


def efficiency_of(row: Row, rows: list[Row]) -> tuple[float, float] | None:
    """Tokens per second and GPU, against those of one GPU with the same tokens; without and with overlap."""
    tokens = row["length"] * row["rows"] / row["gpus"]
    for one in rows:
        same = all(one[name] == row[name] for name in ("model", "length"))
        if same and one["gpus"] == 1 and one["length"] * one["rows"] == tokens:
            return one["seconds"] / row["seconds"], one["seconds_overlapped"] / row["seconds_overlapped"]
    return None


def draw(rows: list[Row], axes) -> None:
    left, right = axes
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        color = f"C{number}"
        weak = sorted((row["gpus"], *efficiency_of(row, rows)) for row in rows
                      if row["model"] == model and efficiency_of(row, rows) is not None)  # fmt: skip
        if len(weak) > 1:
            gpus, without, overlapped = zip(*weak, strict=True)
            left.plot(gpus, [100 * x for x in overlapped], marker="o", color=color, label=model)
            left.fill_between(gpus, [100 * x for x in without], [100 * x for x in overlapped], color=color, alpha=0.2)
        for count, marker in ((1, "s"), (8, "o"), (64, "^")):
            chosen = [row for row in rows if row["model"] == model and row["gpus"] == count]
            points = sorted((row["length"], row["memory_bytes"] / 1e9) for row in chosen)
            if points:
                right.plot(*zip(*points, strict=True), marker=marker, color=color, label=f"{model}, {count}")
    left.set(xscale="log", xlabel="GPUs", ylabel="weak scaling, % of one GPU", xlim=(0.8, 80), ylim=(0, 105))
    left.set_title("2 K tokens a row")
    left.set_xticks([1, 8, 64], ["1", "8", "64"])
    if left.lines:
        left.legend(title="line: overlapped; band: to not at all", fontsize=7, title_fontsize=7)
    for name, size in MEMORY.items():
        right.axhline(size / 1e9, color="gray", linestyle="--", linewidth=0.8)
        right.text(2 * K, size / 1e9, name, fontsize=7, va="bottom")
    right.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel="GB per GPU", title="memory of the step")
    right.legend(title="model, GPUs", fontsize=6, title_fontsize=7)


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    unknown = set(arguments.only) - {case.name for case in CASES}
    if unknown:
        raise UserError(f"only has {', '.join(sorted(unknown))}: choose from {' '.join(case.name for case in CASES)}")
    results = ResultsFile(arguments.results, dataclasses.asdict(arguments.assumptions))
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"{math.ceil(64 / HOST)}x{HOST}x1"
    ).devices
    for case in CASES:
        fields = dataclasses.asdict(case)
        if results.find(**fields) is not None or (arguments.only and case.name not in arguments.only):
            continue
        row = fields | compile_case(case, devices)
        results.add(row | modelled(case, row, arguments.assumptions))
        memory = row["memory_bytes"] / 1e9
        print(f"{case.name}: {memory:.1f} GB per GPU, compiled in {row['compile_seconds']:.0f} s", flush=True)
    order = {case: place for place, case in enumerate(CASES)}
    names = [field.name for field in dataclasses.fields(Case)]
    rows = sorted(results.rows, key=lambda row: order[Case(**{name: row[name] for name in names})])
    text = table(rows, arguments.assumptions)
    print(text)
    arguments.results.with_suffix(".md").write_text(text)
    plot(arguments.results.with_suffix(".png"), lambda axes: draw(rows, axes), columns=2)


def main(argv: list[str] | None = None) -> int:
    # The compiler for GPUs is a plugin that needs no GPU; everything else here runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
