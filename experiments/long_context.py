"""Trains one model on one long sequence, on the GPUs that are here: memory and tokens per second.

With no arguments on a GPU: gla-340m at 262,144 tokens per sequence, batch 1, full remat, random tokens; on a CPU a tiny
model at 4,096. Writes results/long_context.json.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from glax.data import DataConfig
from glax.errors import exit_code
from glax.models import PRESETS
from glax.training import MeshConfig, TrainConfig
from glax.training.loop import plan_and_trace
from glax.training.sharding import check_divisible, make_mesh, place_batch, use_mesh
from glax.training.utilization import peak_flops
from provenance import provenance
from results_file import make_folder


@dataclasses.dataclass(frozen=True)
class Arguments:
    preset: str | None = None
    """Model. None: gla-340m on a GPU, gla-tiny on a CPU."""

    length: int | None = None
    """Tokens of the sequence. None: 262144 on a GPU, 4096 on a CPU."""

    steps: int = 3
    """Steps that are timed, after two that are not."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices share the work."""

    results: Path = Path(__file__).parent / "results" / "long_context.json"
    """JSON of what was seen."""


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    make_folder(arguments.results)
    on_gpu = jax.default_backend() == "gpu"
    preset = arguments.preset or ("gla-340m" if on_gpu else "gla-tiny")
    length = arguments.length or (262144 if on_gpu else 4096)
    model = dataclasses.replace(PRESETS[preset], remat="full", scan_layers=True)
    model = model if on_gpu else dataclasses.replace(model, compute_dtype="float32")
    mesh = make_mesh(arguments.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    config = TrainConfig(model, DataConfig(sequence_length=length, batch_size=rows), mesh=arguments.mesh)
    check_divisible(mesh, model, config.data, 1)
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(rows, length + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "weights": np.ones((rows, length), np.float32),
    }
    with use_mesh(mesh):
        plan, lowered = plan_and_trace(config, mesh, 1)
        started = time.monotonic()
        step = lowered.compile()
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
        planned = step.memory_analysis()
        state, placed = plan.initialize(), place_batch(batch, mesh)
        losses, times = [], []
        for _ in range(2 + arguments.steps):
            started = time.monotonic()
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
            times.append(time.monotonic() - started)
            print(f"loss {losses[-1]:.4f}, {times[-1]:.3f} s", flush=True)
    seconds = float(np.median(times[2:]))
    peak = peak_flops(list(mesh.devices.flat))
    speed = rows * length / seconds
    result = {
        "preset": preset,
        "length": length,
        "rows": rows,
        "config": dataclasses.asdict(config),
        "ran_on": provenance(),
        "losses": losses,
        "step_seconds": times[2:],
        "tokens_per_second": speed,
        "mfu": speed * model.flops_per_token(length) / peak if peak else None,
        "compiled_bytes": planned.argument_size_in_bytes + planned.temp_size_in_bytes
        + planned.output_size_in_bytes - planned.alias_size_in_bytes,
        "peak_bytes_in_use": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }  # fmt: skip
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{preset} at {length:,} tokens: {speed:,.0f} tokens/s, MFU {result['mfu']}, compiled for "
        f"{result['compiled_bytes'] / 1e9:.1f} GB, peak {(result['peak_bytes_in_use'] or 0) / 1e9:.1f} GB"
    )


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
