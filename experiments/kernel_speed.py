"""Time, memory and accuracy of gated linear attention by length and shape, beside softmax attention and the floor.

With no arguments: every implementation that runs on this device; on a CPU at tiny shapes, in about a minute. On a GPU
the shapes are those of the paper's Figure 2 (16 heads of 64 at constant tokens) and of its models:

    --cases fig2_2k,1b3_2k --gates strong --packed 16

A case that fails is a row with its error. Results are three files in --results: a JSON with what they ran on, a
markdown table, and a plot like Figure 2.

Time is the median over rounds in which all implementations take turns. Forward + backward returns o and every gradient
for a given do. Memory is temporaries and outputs, from the compiled program's own account (for fla: torch's peak).
The floor reads each input once and writes each output once, at the copy speed: the known one, or as measured.
Errors are relative RMS, of a row's first tokens of one head, against the recurrence in float64 on the same inputs.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from glax.errors import UserError, exit_code
from kernel_speed_report import GRADIENTS, plot, table
from kernels import gated_linear_attention
from kernels.gla import api
from provenance import provenance
from results_file import make_folder


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one measurement."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def floor_bytes(self, itemsize: int) -> tuple[int, int]:
        """Fewest bytes of forward, and of forward + backward."""
        forward = 3 * self.K + 2 * self.V  # q, k, log_alpha, v; o
        backward = 6 * self.K + 3 * self.V  # q, k, log_alpha, v, do; dq, dk, dlog_alpha, dv
        numbers = self.B * self.T * self.H * itemsize
        return numbers * forward, numbers * (forward + backward)


CASES = {f"cpu_{T}": Case(2048 // T, T, 2, 32, 32) for T in (256, 512, 1024, 2048)}
CASES |= {f"fig2_{k}k": Case(64 // k, k * 1024, 16, 64, 64) for k in (1, 2, 4, 8, 16, 32)}
CASES |= {
    "d128_2k": Case(32, 2048, 8, 128, 128),
    "long_8k": Case(1, 8192, 96, 128, 128),
    "340m_2k": Case(32, 2048, 4, 128, 256),
    "1b3_2k": Case(16, 2048, 4, 256, 512),
    "1b3_32k": Case(1, 32768, 4, 256, 512),
}

GATES = {
    "gla": lambda key, shape: jax.nn.log_sigmoid(jax.random.normal(key, shape)) / 16,
    "unscaled": lambda key, shape: jax.nn.log_sigmoid(jax.random.normal(key, shape)),
    "strong": lambda key, shape: -60 * jax.random.uniform(key, shape),
    "inf": lambda key, shape: jnp.where(
        jax.random.bernoulli(key, 0.05, shape), -jnp.inf, GATES["gla"](jax.random.fold_in(key, 1), shape)
    ),
}
PEERS = ("jla", "fla")
COPY_BYTES_PER_SECOND = {"NVIDIA H200": 4.27e12}  # a device-to-device copy of 8 GB, read and written


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    cases: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Shapes by name. None: cpu_* on a CPU, all others on a GPU."""

    implementations: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Of gated linear attention. None: all that run here (on a GPU without the reference)."""

    peers: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = ""
    """Other packages, where installed: jla (jax-linear-attention), fla (flash-linear-attention, torch)."""

    softmax: bool = True
    """Also measure softmax attention of the same model width: by cuDNN on a GPU."""

    gates: Literal["gla", "unscaled", "strong", "inf"] = "gla"
    """log_sigmoid(normal) / 16; the same unscaled; uniform in [-60, 0]; the first with 5% of hard resets."""

    packed: int = 1
    """Documents per row."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of inputs and gates. None: bfloat16 on a GPU; float32 on a CPU, which only emulates the others."""

    rounds: int = 7
    """Turns of each implementation; the median counts."""

    tokens_checked: int = 2048
    """Length of the slice that is compared with the recurrence. 0: none."""

    results: Path = Path(__file__).parent / "results" / "kernel_speed"
    """Folder of the results."""

    name: str | None = None
    """Name of the files. None: the device's, the gates' and the packing."""


@dataclasses.dataclass
class Program:
    """Something compiled, with the numbers from its first call."""

    run: Callable[..., Any]
    first_call_s: float
    memory_mib: float


def inputs_of(case: Case, gates: str, dtype: str, packed: int) -> tuple[list[jax.Array], jax.Array | None, jax.Array]:
    """[q, k, v, log_alpha], segment_ids or None, and do."""
    c, keys = case, jax.random.split(jax.random.key(0), 5)
    q, k = (jax.random.normal(key, (c.B, c.T, c.H, c.K), dtype) for key in keys[:2])
    v, do = (jax.random.normal(key, (c.B, c.T, c.H, c.V), dtype) for key in keys[2:4])
    log_alpha = GATES[gates](keys[4], (c.B, c.T, c.H, c.K)).astype(dtype)
    segment_ids = None if packed == 1 else jnp.tile(jnp.arange(c.T, dtype=jnp.int32) * packed // c.T, (c.B, 1))
    return [q, k, v, log_alpha], segment_ids, do


def softmax_inputs(case: Case, name: str, dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """[q, k, v] and do of softmax attention of the same model width: heads of 64 beside Figure 2's, else of 128."""
    width = min(64 if case.K <= 64 else 128, case.H * case.V)
    shape = (case.B, case.T, case.H * case.V // width, width)
    *qkv, do = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(1), 4))
    return qkv, do


def with_backward(call: Callable) -> Callable:
    """A function of do and the arguments of `call`: what that returns, and the gradients of each argument."""

    def both(do, *arguments):
        o, vjp = jax.vjp(call, *arguments)
        return o, *vjp(do)

    return both


def compiled(call: Callable, arguments: list, do: jax.Array | None) -> Program:
    """`call`, or with `do` its forward and backward, traced, compiled and run once."""
    function, arguments = (call, arguments) if do is None else (with_backward(call), [do, *arguments])
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Program(
        functools.partial(program, *arguments) if do is None else lambda do=do: program(do, *arguments[1:]),
        seconds,
        (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20,
    )


def medians_ms(runs: dict[Any, Callable], rounds: int) -> dict[Any, float]:
    """Milliseconds of one call of each: medians over rounds in which they take turns."""

    def seconds(run, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    repeats = {key: max(1, min(50, int(0.02 / seconds(run, 2)))) for key, run in runs.items()}
    samples = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            samples[key].append(seconds(run, repeats[key]))
    return {key: 1e3 * float(np.median(times)) for key, times in samples.items()}


def copy_bytes_per_second(rounds: int) -> float:
    """Bytes read and written per second by one pass over a large array.

    Where the device's own copy is known it counts: an elementwise pass of XLA's reached 2.2 to 2.5 TB/s on the H200,
    and a floor at that speed would flatter.
    """
    if known := COPY_BYTES_PER_SECOND.get(jax.devices()[0].device_kind):
        return known
    x = jnp.ones(2**29 if jax.default_backend() == "gpu" else 2**25, jnp.bfloat16)
    # Bits are flipped so that nothing can be elided, and no arithmetic is emulated.
    flip = jax.jit(lambda x: jax.lax.bitcast_convert_type(~jax.lax.bitcast_convert_type(x, jnp.uint16), x.dtype))
    return 2 * x.nbytes / (1e-3 * medians_ms({"copy": lambda: flip(x)}, rounds)["copy"])


def accuracy(both: Program, arguments: list, segment_ids, do: jax.Array, tokens: int) -> dict[str, Any]:
    """Errors of the first tokens of one head; whether later gradients are exactly zero; whether bits repeat.

    With do zero after those tokens, everything about them is a matter of these tokens alone.
    """
    tokens = min(tokens, 3 * do.shape[1] // 4 + 5)  # in the middle of a chunk
    do = jnp.where(jnp.arange(do.shape[1])[:, None, None] < tokens, do, jnp.zeros((), do.dtype))
    outputs, again = both.run(do), both.run(do)
    same_bits = all(bool(jnp.array_equal(x, y)) for x, y in zip(outputs, again, strict=True))
    causal = not any(bool(jnp.any(x[:, tokens:])) for x in outputs[1:])
    first = lambda x: np.asarray(x[:1, :tokens, :1])  # noqa: E731
    ids = None if segment_ids is None else np.asarray(segment_ids[:1, :tokens])
    wanted = recurrence(*map(first, arguments), ids, first(do))
    errors = {}
    for name, x, want in zip(("o", *GRADIENTS), outputs, wanted, strict=True):
        got, want = first(x).astype(np.float64), np.asarray(want)
        errors[name] = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    return {"errors": errors, "causal": causal, "same_bits": same_bits}


def recurrence(q, k, v, log_alpha, segment_ids, do) -> tuple[jax.Array, ...]:
    """o and gradients by the reference, in float64."""
    with jax.enable_x64(), jax.default_matmul_precision("highest"):
        call = functools.partial(gated_linear_attention, segment_ids=segment_ids, implementation="reference")

        def both(do, *arguments):
            o, vjp = jax.vjp(call, *arguments)
            return o, *vjp(do)

        return jax.jit(both)(*(jnp.asarray(np.asarray(x, np.float64)) for x in (do, q, k, v, log_alpha)))


def operators(arguments: Arguments) -> dict[str, Callable | None]:
    """Name of each gated linear attention to its call(segment_ids)(q, k, v, log_alpha); None for fla: see fla_speed."""

    def ours(name):
        return lambda segment_ids: functools.partial(
            gated_linear_attention, segment_ids=segment_ids, implementation=name
        )

    def jla(segment_ids):
        from jla.ops import linear_attention

        if segment_ids is not None:
            raise NotImplementedError("documents are not measured with jla")
        return lambda q, k, v, g: linear_attention("gla", q, k, v, g=g, impl="auto")[0]

    names = arguments.implementations.split(",") if arguments.implementations is not None else _running_here(arguments)
    found = {name: ours(name) for name in names if name}
    for peer in filter(None, arguments.peers.split(",")):
        found[peer] = {"jla": jla, "fla": None}[peer]
    return found


def _running_here(arguments: Arguments) -> list[str]:
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), _dtype(arguments))
    names = []
    for name in api.IMPLEMENTATIONS:
        if name == "reference" and jax.default_backend() == "gpu":
            continue
        try:
            jax.eval_shape(functools.partial(gated_linear_attention, implementation=name), x, x, x, x)
        except (NotImplementedError, ImportError):
            continue
        names.append(name)
    return names


def measure_case(name: str, arguments: Arguments, copy_speed: float) -> list[dict[str, Any]]:
    """A row per implementation."""
    case, dtype = CASES[name], _dtype(arguments)
    inputs, segment_ids, do = inputs_of(case, arguments.gates, dtype, arguments.packed)
    floors = [1e3 * size / copy_speed for size in case.floor_bytes(do.dtype.itemsize)]
    rows, programs = [], {}

    def attempt(row, work):
        try:
            work(row)
        except Exception as error:  # out of memory, unsupported, not installed: each is an answer about this case
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def prepare(row, call, arguments, do):
        found = {"forward": compiled(call, arguments, None), "both": compiled(call, arguments, do)}
        for part, program in found.items():
            row[f"{part}_first_call_s"], row[f"{part}_mib"] = program.first_call_s, program.memory_mib
        programs.update({(row["implementation"], part): program for part, program in found.items()})

    for label, operator in operators(arguments).items():
        row = {"case": name, "implementation": label, "forward_floor_ms": floors[0], "both_floor_ms": floors[1]}
        rows.append(row)
        if operator is None:
            attempt(row, lambda row: row.update(fla_speed(name, arguments)))
            continue
        attempt(row, lambda row, operator=operator: prepare(row, operator(segment_ids), inputs, do))
        if "error" not in row and arguments.tokens_checked:
            both = programs[label, "both"]
            attempt(row, lambda row, b=both: row.update(accuracy(b, inputs, segment_ids, do, arguments.tokens_checked)))
    if arguments.softmax and arguments.packed == 1:
        backend = "cudnn" if jax.default_backend() == "gpu" else "xla"
        row = {"case": name, "implementation": f"softmax ({backend})"}
        rows.append(row)
        call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=backend)
        attempt(row, lambda row: prepare(row, call, *softmax_inputs(case, name, dtype)))

    def take_times(_):
        times = medians_ms({key: program.run for key, program in programs.items()}, arguments.rounds)
        for row in rows:
            for part in ("forward", "both"):
                if (row["implementation"], part) in times:
                    row[f"{part}_ms"] = times[row["implementation"], part]

    failure = {}
    attempt(failure, take_times)
    return [row | failure for row in rows]


def fla_speed(name: str, arguments: Arguments) -> dict[str, Any]:
    """fla's numbers, from a process of its own: fla_speed.py."""
    script = Path(__file__).with_name("fla_speed.py")
    case = dataclasses.asdict(CASES[name]) | {"gates": arguments.gates, "packed": arguments.packed}
    done = subprocess.run([sys.executable, script, json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    on_cpu = jax.default_backend() == "cpu"
    named = arguments.cases.split(",") if arguments.cases else [c for c in CASES if c.startswith("cpu") == on_cpu]
    _check(arguments, named)
    default_name = f"{jax.devices()[0].device_kind}-{arguments.gates}-{arguments.packed}".lower().replace(" ", "-")
    stem = arguments.results / (arguments.name or default_name)
    make_folder(stem)
    copy_speed = copy_bytes_per_second(arguments.rounds)
    content = {
        "ran_on": provenance(),
        "dtype": _dtype(arguments),
        "gates": arguments.gates,
        "packed": arguments.packed,
        "memory": "temporaries and outputs by compiled.memory_analysis(); fla: torch.cuda.max_memory_allocated()",
        "copy_gb_per_s": copy_speed / 1e9,
        "shapes": {name: dataclasses.asdict(CASES[name]) for name in named},
        "rows": [],
    }
    for position, name in enumerate(named, 1):
        print(f"{position}/{len(named)} {name}", file=sys.stderr, flush=True)
        content["rows"] += measure_case(name, arguments, copy_speed)
        stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(content))
    print(table(content))
    if any("both_ms" in row for row in content["rows"]):
        plot(content, stem.with_suffix(".png"))
    print(f"results: {stem}.json, .md, .png", file=sys.stderr)


def _check(arguments: Arguments, named: list[str]) -> None:
    for name in named:
        if name not in CASES:
            raise UserError(f"--cases: {name} is not one of {', '.join(CASES)}")
        if not 1 <= arguments.packed <= CASES[name].T:
            raise UserError(f"--packed {arguments.packed}: give from 1 to {CASES[name].T} documents for {name}")
    for name in (arguments.implementations or "").split(","):
        if name and name not in api.IMPLEMENTATIONS:
            raise UserError(f"--implementations: {name} is not one of {', '.join(api.IMPLEMENTATIONS)}")
    for name in filter(None, arguments.peers.split(",")):
        if name not in PEERS:
            raise UserError(f"--peers: {name} is not one of {', '.join(PEERS)}")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: give at least 1")


def _dtype(arguments: Arguments) -> str:
    return arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
