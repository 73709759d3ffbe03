"""Time, memory and accuracy of the operators beside gated linear attention: the selective scan, and retention.

With no arguments: every implementation that runs on this device; on a CPU at tiny shapes, in about a minute. The
selective scan stands beside the floor (and beside jax-linear-attention's `mamba1` with --peers, where it is installed),
retention beside gated linear attention at the same shape. A case that fails is a row with its error.

Time is the median over rounds in which all implementations of a case take turns. Forward + backward returns the output
and every gradient for a given gradient of the output; with "fixed decays", as RetNet has them, none of the decays.
Memory is temporaries and outputs, from the compiled program's account. The floor reads each input once and writes each
output once at the device's copy speed; for the scan it is also the time that its exponentials take, 16 per clock and
multiprocessor, one per state and token forward and two backward. Errors are relative RMS, of the first tokens of one
row, against the recurrence in float64 on the same inputs.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from glax.errors import UserError, exit_code
from kernel_speed import compiled, copy_bytes_per_second, medians_ms
from kernels import gated_linear_attention, retention, selective_scan
from provenance import provenance
from results_file import make_folder

OURS = ("mosaic_gpu", "xla")
EXPONENTIALS_PER_SECOND = {"NVIDIA H200": 132 * 16 * 1.755e9}  # multiprocessors, per clock, clocks while measuring


@dataclasses.dataclass(frozen=True)
class Scan:
    """Shapes of a selective scan."""

    B: int
    T: int
    E: int
    N: int = 16

    names = ("x", "dt", "A", "B", "C", "D")
    output = "y"

    def inputs(self, dtype):
        """x, dt, A, B, C, D as Mamba's layer has them, and dy."""
        keys = jax.random.split(jax.random.key(0), 6)
        tokens = (self.B, self.T)
        x, dy, steps = (jax.random.normal(key, (*tokens, self.E), dtype) for key in keys[:3])
        B, C = (jax.random.normal(key, (*tokens, self.N), dtype) for key in keys[3:5])
        dt = jax.nn.softplus(steps.astype(jnp.float32) - 4).astype(dtype)
        A = -jnp.broadcast_to(jnp.arange(1.0, self.N + 1), (self.E, self.N))
        return [x, dt, A, B, C, jax.random.normal(keys[5], (self.E,))], dy

    def operators(self, peers):
        """Name to call(x, dt, A, B, C, D)."""
        ours = {name: functools.partial(selective_scan, implementation=name) for name in OURS}
        return ours | ({"jla": _jla_mamba1} if "jla" in peers else {})

    def recurrence(self, *arguments):
        return selective_scan(*arguments, implementation="reference")

    def first(self, arrays, tokens):
        """The first tokens of one row, 4 channels; B, C and the other channels matter to nothing that is compared."""
        return [x[:4] if x.ndim < 3 else x[:1, :tokens, : 4 if x.shape[2] == self.E else None] for x in arrays]

    def floor_ms(self, itemsize, copy_speed):
        tokens = self.B * self.T
        moved = [tokens * itemsize * (3 * self.E + 2 * self.N), tokens * itemsize * (8 * self.E + 6 * self.N)]
        speed = EXPONENTIALS_PER_SECOND.get(jax.devices()[0].device_kind, float("inf"))
        exponentials = [n * tokens * self.E * self.N for n in (1, 3)]
        return [1e3 * max(b / copy_speed, e / speed) for b, e in zip(moved, exponentials, strict=True)]


@dataclasses.dataclass(frozen=True)
class Retention:
    """Shapes of retention."""

    B: int
    T: int
    H: int
    K: int
    V: int

    names = ("q", "k", "v", "log_gamma")
    output = "o"

    def inputs(self, dtype):
        """q, k, v, a decay of each token, float32, about RetNet's; and do."""
        keys = jax.random.split(jax.random.key(0), 5)
        tokens = (self.B, self.T, self.H)
        q, k = (jax.random.normal(key, (*tokens, self.K), dtype) for key in keys[:2])
        v, do = (jax.random.normal(key, (*tokens, self.V), dtype) for key in keys[2:4])
        log_gamma = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.H) % 4))) * jax.random.uniform(keys[4], tokens, maxval=2)
        return [q, k, v, log_gamma], do

    def operators(self, peers):
        """Name to call(q, k, v, log_gamma)."""
        ours = {name: functools.partial(retention, implementation=name) for name in OURS}
        ours |= {f"{name} fixed decays": functools.partial(_fixed_decays, name) for name in OURS}
        return ours | {f"gla {name}": functools.partial(_gla, name) for name in OURS}

    def recurrence(self, *arguments):
        return retention(*arguments, implementation="reference")

    def first(self, arrays, tokens):
        """The first tokens of one row and head."""
        return [x[:1, :tokens, :1] for x in arrays]

    def floor_ms(self, itemsize, copy_speed):
        tokens = self.B * self.T * self.H * itemsize
        moved = [tokens * (2 * self.K + 2 * self.V), tokens * (6 * self.K + 5 * self.V)]
        return [1e3 * b / copy_speed for b in moved]


CASES = {
    "cpu_scan": Scan(2, 256, 128),
    "cpu_retention": Retention(2, 256, 2, 32, 32),
    "scan_340m": Scan(16, 2048, 2048),
    "scan_1b3": Scan(8, 2048, 4096),
    "scan_b16": Scan(16, 2048, 4096),
    "retention_64": Retention(32, 2048, 16, 64, 64),
    "retention_128": Retention(32, 2048, 8, 128, 128),
    "retention_1b3": Retention(16, 2048, 4, 256, 512),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    cases: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Shapes by name. None: cpu_* on a CPU, all others on a GPU."""

    implementations: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """None: all but those that are known not to run here."""

    peers: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = ""
    """Other packages, where installed: jla (jax-linear-attention)."""

    rounds: int = 7
    """Turns of each implementation; the median counts."""

    tokens_checked: int = 1024
    """Length of the slice that is compared with the recurrence. 0: none."""

    results: Path = Path(__file__).parent / "results" / "operator_speed"
    """Folder of the results."""

    name: str | None = None
    """Name of the files. None: the device's."""


def _jla_mamba1(x, dt, A, B, C, D):
    from jla.ops import linear_attention

    return linear_attention("mamba1", C, B, x, dt=dt, a=A, d=D, impl="auto")[0]


def _fixed_decays(implementation, q, k, v, log_gamma):
    """Retention as RetNet has it: nothing asks for the gradient of decays, which is 0 here."""
    return retention(q, k, v, jax.lax.stop_gradient(log_gamma), implementation=implementation)


def _gla(implementation, q, k, v, log_gamma):
    """Gated linear attention of the same shape, a gate for each channel."""
    log_alpha = jnp.broadcast_to(log_gamma[..., None], k.shape).astype(k.dtype)
    return gated_linear_attention(q, k, v, log_alpha, implementation=implementation)


def accuracy(case, both: Callable, arguments: list, d_output: jax.Array, tokens: int) -> dict[str, Any]:
    """Errors of the first tokens; whether later gradients are exactly zero; whether bits repeat.

    With the output's gradient zero everywhere else, everything about these tokens is a matter of them alone.
    """
    tokens = min(tokens, 3 * d_output.shape[1] // 4 + 5)
    (chosen,) = case.first([jnp.ones_like(d_output)], tokens)
    mask = jnp.zeros_like(d_output)[: chosen.shape[0]].at[tuple(slice(n) for n in chosen.shape)].set(1)
    d_output = d_output * jnp.pad(mask, ((0, d_output.shape[0] - 1),) + ((0, 0),) * (mask.ndim - 1))
    outputs, again = both(d_output), both(d_output)
    same_bits = all(bool(jnp.array_equal(x, y)) for x, y in zip(outputs, again, strict=True))
    per_token = [x for x, y in zip(outputs[1:], arguments, strict=True) if y.shape[:2] == d_output.shape[:2]]
    causal = not any(bool(jnp.any(x[:, tokens:])) for x in per_token)
    with jax.enable_x64(), jax.default_matmul_precision("highest"):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in case.first([*arguments, d_output], tokens)]

        def recurrence(d_output, *arguments):
            output, vjp = jax.vjp(case.recurrence, *arguments)
            return output, *vjp(d_output)

        wanted = jax.jit(recurrence)(wide[-1], *wide[:-1])
    errors = {}
    for name, x, want in zip(
        (case.output, *(f"d{name}" for name in case.names)), case.first(outputs, tokens), wanted, strict=True
    ):
        got, want = np.asarray(x).astype(np.float64), np.asarray(want)
        errors[name] = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    return {"errors": errors, "causal": causal, "same_bits": same_bits}


def measure_case(name: str, arguments: Arguments, copy_speed: float) -> list[dict[str, Any]]:
    """A row per implementation."""
    case = CASES[name]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    inputs, d_output = case.inputs(dtype)
    floors = case.floor_ms(d_output.dtype.itemsize, copy_speed)
    rows, programs = [], {}

    def attempt(row, work):
        try:
            work()
        except Exception as error:  # out of memory, unsupported, not installed: each is an answer about this case
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    for label, call in case.operators(arguments.peers.split(",")).items():
        if arguments.implementations is not None and label not in arguments.implementations.split(","):
            continue
        row = {"case": name, "implementation": label, "forward_floor_ms": floors[0], "both_floor_ms": floors[1]}
        rows.append(row)

        def prepare(row=row, label=label, call=call):
            for part, of in (("forward", None), ("both", d_output)):
                program = compiled(call, inputs, of)
                row[f"{part}_first_call_s"], row[f"{part}_mib"] = program.first_call_s, program.memory_mib
                programs[label, part] = program.run
            if arguments.tokens_checked and label in OURS:  # with every gradient, as the recurrence has
                row.update(accuracy(case, programs[label, "both"], inputs, d_output, arguments.tokens_checked))

        attempt(row, prepare)
        print(f"  {label}: {row.get('error', 'ready')} {row.get('errors', '')}", file=sys.stderr, flush=True)
    for (label, part), ms in medians_ms(programs, arguments.rounds).items():
        next(row for row in rows if row["implementation"] == label)[f"{part}_ms"] = ms
    return rows


def table(content: dict[str, Any]) -> str:
    """The rows as markdown, with what they ran on."""
    ran_on = content["ran_on"]
    lines = [
        f"{ran_on['device']}, jax {ran_on['versions']['jax']}, commit {ran_on['commit']}; {content['dtype']}, copy "
        f"{content['copy_gb_per_s']:.0f} GB/s. Medians in milliseconds; MiB of temporaries and outputs of forward / "
        "forward + backward; -: not measured.",
        "",
        "| case | implementation | forward | forward + backward | times floor | MiB | first call, s | errors | causal "
        "| same bits |",
        "|---" * 10 + "|",
    ]
    for row in content["rows"]:
        cells = [f"{row['case']} {tuple(content['shapes'][row['case']].values())}", row["implementation"]]
        if "both_ms" in row:
            errors = row.get("errors", {})
            cells += [f"{row['forward_ms']:.3f}", f"{row['both_ms']:.3f}"]
            cells.append(
                " / ".join(f"{row[f'{part}_ms'] / row[f'{part}_floor_ms']:.2f}" for part in ("forward", "both"))
            )
            cells.append(f"{row['forward_mib']:.0f} / {row['both_mib']:.0f}")
            cells.append(f"{row['forward_first_call_s'] + row['both_first_call_s']:.1f}")
            cells.append(", ".join(f"{name} {error:.1e}" for name, error in errors.items()) or "-")
            cells += ["yes" if row[key] else "no" for key in ("causal", "same_bits")] if errors else ["-", "-"]
        cells += [row["error"].replace("|", "/")] if "error" in row and "both_ms" not in row else []
        lines.append("| " + " | ".join(cells + [""] * (10 - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    on_cpu = jax.default_backend() == "cpu"
    named = arguments.cases.split(",") if arguments.cases else [c for c in CASES if c.startswith("cpu") == on_cpu]
    for name in named:
        if name not in CASES:
            raise UserError(f"--cases: {name} is not one of {', '.join(CASES)}")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: give at least 1")
    stem = arguments.results / (arguments.name or jax.devices()[0].device_kind.lower().replace(" ", "-"))
    make_folder(stem)
    copy_speed = copy_bytes_per_second(arguments.rounds)
    content = {
        "ran_on": provenance(),
        "dtype": "float32" if on_cpu else "bfloat16",
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
    print(f"results: {stem}.json, .md", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
