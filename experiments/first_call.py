"""Seconds until the first forward and backward of a shape: traced, lowered, compiled and run, each in a new process.

With no arguments: the shapes of kernel_speed.py on a GPU, its smallest one on a CPU. The persistent compilation cache
is off. "second" is another program of the same process with the same calls.

    --cases fig2_2k,long_8k --repeats 3
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro

from glax.errors import UserError, exit_code
from kernel_speed import CASES, inputs_of, with_backward
from kernels import gated_linear_attention
from kernels.gla import api
from results_file import ResultsFile

STAGES = ("trace", "lower", "compile", "run")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    cases: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Shapes by name. None: on a GPU those of the README's table, on a CPU cpu_256."""

    implementation: str | None = None
    """Of gated linear attention. None: the fastest here."""

    repeats: int = 1
    """Processes for each case."""

    results: Path = Path(__file__).parent.parent / "runs" / "first_call"
    """Folder of the results."""


def measure(name: str, implementation: str | None) -> None:
    """Prints seconds as JSON; for a process that has not called the operator before."""
    jax.config.update("jax_enable_compilation_cache", False)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    inputs, _, do = jax.block_until_ready(inputs_of(CASES[name], "gla", dtype, 1))
    both = with_backward(functools.partial(gated_linear_attention, implementation=implementation))

    def another(do, *inputs):
        return [2 * x for x in both(do + 1, *inputs)]

    found = {}
    for program, function in {"first": both, "second": another}.items():
        at = [time.perf_counter()]
        done = jax.jit(function).trace(do, *inputs)
        at.append(time.perf_counter())
        done = done.lower()
        at.append(time.perf_counter())
        done = done.compile()
        at.append(time.perf_counter())
        jax.block_until_ready(done(do, *inputs))
        at.append(time.perf_counter())
        seconds = {stage: after - before for stage, before, after in zip(STAGES, at, at[1:], strict=False)}
        found[program] = {stage: round(x, 2) for stage, x in (seconds | {"all": at[-1] - at[0]}).items()}
    print(json.dumps(found))


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the card's memory is for the processes that measure
    table = ["fig2_2k", "fig2_16k", "d128_2k", "long_8k", "340m_2k", "1b3_2k", "1b3_32k"]
    default = ["cpu_256"] if jax.default_backend() == "cpu" else table
    named = arguments.cases.split(",") if arguments.cases else default
    for name in named:
        if name not in CASES:
            raise UserError(f"--cases: {name} is not one of {', '.join(CASES)}")
    if arguments.implementation not in (None, *api.IMPLEMENTATIONS):
        raise UserError(f"--implementation: {arguments.implementation} is not one of {', '.join(api.IMPLEMENTATIONS)}")
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: give at least 1")
    path = arguments.results / f"{jax.devices()[0].device_kind}.json".lower().replace(" ", "-")
    file = ResultsFile(path, {"implementation": arguments.implementation}, unit="seconds")
    for repeat in range(arguments.repeats):
        for name in named:
            code = f"import first_call; first_call.measure({name!r}, {arguments.implementation!r})"
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            row = {"case": name, "repeat": repeat} | json.loads(done.stdout.splitlines()[-1])
            file.add(row, replacing=file.find(case=name, repeat=repeat))
            print(f"{name}: {row['first']['all']} s, another program {row['second']['all']} s", flush=True)
    print(f"results: {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
