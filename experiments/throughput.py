"""Training throughput (paper, Figure 6): tokens/s, MFU and peak memory by length x batch, for each model.

With no arguments on a CPU: the four small models at two shapes, in about a minute. On a GPU: the 1.3B models at the
paper's shapes, with everything a training step does (forward, backward, clipping, AdamW, the check for non-finite
gradients, a new batch from the host):

    --models gla-1.3b,transformer-1.3b,retnet-1.3b,mamba-1.3b --shapes 2048x8,4096x4,8192x2,16384x1 --profile

Several GPUs share a step by --meshes. A shape has all rows of the step: 2048x32 on four is 2048x8 on one.

    --models gla-1.3b --shapes 2048x32 --meshes data4,fsdp4,fsdp2xtensor2,sequence4

tokens/s is that of the median step. MFU counts model FLOPs, without recomputation, against the cards' dense bf16 peak.
Memory is what the compiled step needs on a device at its peak: state, batch and temporaries. --profile tells where a
GPU's time goes in real steps, by part of the model and by kernel; --parts times parts alone: a layer's operator, mixer
and MLP forward + backward, the loss, the optimiser. A row that fails has its error. The same command continues after
the rows that are there.
"""

import dataclasses
import functools
import gc
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh

from glax.data import DataConfig
from glax.errors import UserError, exit_code
from glax.layers import SwiGLU
from glax.models import PRESETS, ModelConfig
from glax.models.blocks import MIXERS, Block
from glax.training import MeshConfig, TrainConfig
from glax.training.loop import plan_and_trace
from glax.training.sharding import AXES, check_divisible, make_mesh, place_batch, use_mesh
from glax.training.state import plan_state
from glax.training.utilization import peak_flops
from kernels import gated_linear_attention, retention, selective_scan, softmax_cross_entropy
from results_file import ResultsFile, plot
from step_profile import kernel_times, profile_by_part, scopes_of

WARM_STEPS = 3
MODELS = ("gla", "transformer", "retnet", "mamba")
NO_GRAPHS = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": str(2**30)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    models: str | None = None
    """Comma-separated presets. None: the four of 1.3B on a GPU, the four small ones elsewhere."""

    shapes: str | None = None
    """Comma-separated LENGTHxBATCH, all rows of a step. None: 2048x8,4096x4,8192x2,16384x1 on a GPU, 64x4,256x1
    elsewhere."""

    meshes: str = "1"
    """Comma-separated, devices that share a step: 1, or axes of a mesh with their sizes, such as data4 or
    fsdp2xtensor2."""

    implementations: str = "fastest"
    """Comma-separated kernels of the recurrent models: fastest, mosaic_gpu, xla, reference."""

    remat: str = "none"
    """Comma-separated, what the backward pass computes again: none, full, matmuls."""

    unroll_layers: bool | None = None
    """Layers one by one, or in a scan. None: as ModelConfig does."""

    steps: int = 10
    """Timed steps, after three to warm up."""

    parts: bool = False
    """Also time the parts of a step, where it has one device."""

    profile: bool = False
    """Also trace three steps, and add up what kernels take."""

    compile_threads: int = 1
    """Programs to compile at once, all before any is measured."""

    results: Path = Path("runs/throughput")
    """Folder of throughput.json and throughput.png."""


class Case(NamedTuple):
    """What one row measures."""

    model: str
    shape: str
    implementation: str
    remat: str
    mesh: str | None = None
    """As in --meshes; None is one device, and what rows without a mesh have."""


class Prepared(NamedTuple):
    """A compiled training step."""

    config: TrainConfig
    mesh: Mesh
    step: jax.stages.Compiled
    initialize: jax.stages.Compiled
    seconds: float
    """That the step took to trace and compile."""
    profiled: jax.stages.Compiled | None
    """The step for a profile, where one is wanted: no kernel hidden in a CUDA graph."""


def training(case: Case, unroll_layers: bool | None) -> TrainConfig:
    length, batch = _shape(case.shape)
    model = dataclasses.replace(
        PRESETS[case.model],
        compute_dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
        remat=case.remat,
        unroll_layers=unroll_layers,
        implementation=None if case.implementation == "fastest" else case.implementation,
    )
    data = DataConfig(sequence_length=length, batch_size=batch)
    return TrainConfig(model=model, data=data, mesh=_mesh(case.mesh))


def prepare(case: Case, unroll_layers: bool | None, profile: bool = False) -> Prepared | str:
    """The compiled step, or the error that there was instead."""
    config = training(case, unroll_layers)
    started = time.monotonic()
    try:
        mesh = devices_of(config.mesh)
        check_divisible(mesh, config.model, config.data, 1)
        with use_mesh(mesh):
            plan, lowered = plan_and_trace(config, mesh, 1)
            step, seconds = lowered.compile(), time.monotonic() - started
            profiled = lowered.compile(NO_GRAPHS) if profile and jax.default_backend() == "gpu" else None
            return Prepared(config, mesh, step, plan.initialize.lower().compile(), seconds, profiled)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return _one_line(error)


def devices_of(mesh: MeshConfig) -> Mesh:
    """The first devices, as many as ``mesh`` has. Raises UserError where there are fewer."""
    return make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor])


def random_batch(config: TrainConfig, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows as training makes them: tokens, the ones that follow, documents of uneven length."""
    length, rows = config.data.sequence_length, config.data.batch_size
    tokens = draw.integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
    ends = draw.random((rows, length)) < 2 / length
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": 1 + np.cumsum(ends, 1, dtype=np.int32),
        "weights": np.ones((rows, length), np.float32),
    }


def measure(prepared: Prepared, steps: int) -> dict[str, Any]:
    """Times whole training steps."""
    config, mesh, step, initialize, compiled, profiled = prepared
    draw = np.random.default_rng(0)
    batches = [random_batch(config, draw) for _ in range(4)]
    with use_mesh(mesh):
        state, seconds, first = initialize(), [], []
        for number in range(WARM_STEPS + steps):
            begun = time.monotonic()
            state, metrics = step(state, place_batch(batches[number % 4], mesh))
            loss = float(metrics["loss"])  # waits for the step, as a journal line does
            seconds.append(time.monotonic() - begun)
            first += [[loss, float(metrics["grad_norm"])]] if number < WARM_STEPS else []
        profile = {}
        if profiled is not None:
            state, _ = jax.block_until_ready(profiled(state, place_batch(batches[3], mesh)))
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    for batch in batches[:3]:
                        state, metrics = profiled(state, place_batch(batch, mesh))
                    jax.block_until_ready(state)
                steps_traced = 3 * mesh.size  # a device's
                profile = profile_by_part(kernel_times(Path(folder), steps_traced), scopes_of(profiled.as_text()))
    median = float(np.median(seconds[WARM_STEPS:]))
    tokens = config.data.sequence_length * config.data.batch_size
    flops, peak = config.model.flops_per_token(config.data.sequence_length), peak_flops(list(mesh.devices.flat))
    return {
        "tokens_per_second": round(tokens / median, 1),
        "tokens_per_second_per_device": round(tokens / median / mesh.size, 1),
        "mfu": None if peak is None else round(flops * tokens / median / peak, 4),
        "peak_gib": round(_peak_bytes(step) / 2**30, 3),
        "step_ms": round(1e3 * median, 3),
        "step_ms_range": [round(1e3 * pick(seconds[WARM_STEPS:]), 3) for pick in (min, max)],
        "parameters": config.model.num_parameters(),
        "loss": round(loss, 4),
        "first_losses_and_grad_norms": first,
        "compile_s": round(compiled, 1),
    } | profile


def _peak_bytes(step: jax.stages.Compiled) -> int:
    memory = step.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def time_parts(training_config: TrainConfig) -> dict[str, float]:
    """Milliseconds per step of each part by itself, forward + backward, times the layers that have it.

    "mixer" has "operator" in it, "block" has mixer, MLP and norms.
    """
    config, length, batch = training_config.model, training_config.data.sequence_length, training_config.data.batch_size
    x = jax.random.normal(jax.random.key(0), (batch, length, config.hidden_size), config.dtype)
    layers, parts = config.num_layers, {}

    def of_layer(make: Callable[[nnx.Rngs], nnx.Module], call: Callable) -> float:
        graph, params = nnx.split(make(nnx.Rngs(0)), nnx.Param)

        def loss(params, x):
            return jnp.sum(call(nnx.merge(graph, params), x).astype(jnp.float32) * 1e-3)

        return layers * _milliseconds(jax.jit(jax.grad(loss, (0, 1))), params, x)

    operator, inputs = operator_and_inputs(config, batch, length)
    weighted = jax.grad(lambda *a: jnp.sum(operator(*a).astype(jnp.float32) * 1e-3), tuple(range(len(inputs))))
    parts["operator"] = layers * _milliseconds(jax.jit(weighted), *inputs)
    parts["mixer"] = of_layer(lambda rngs: MIXERS[config.mixer](config, rngs), lambda mixer, x: mixer(x)[0])
    if config.mlp_width:
        mlp = functools.partial(SwiGLU, config.hidden_size, config.mlp_width, std=0.02, dtype=config.dtype)
        parts["mlp"] = of_layer(lambda rngs: mlp(rngs=rngs), lambda mlp, x: mlp(x))
    parts["block"] = of_layer(lambda rngs: Block(config, config.mixer, rngs=rngs), lambda block, x: block(x)[0])

    hidden = x.reshape(-1, config.hidden_size)
    unembedding = jnp.full((config.hidden_size, config.vocab_size), 0.01, config.dtype)
    targets = jnp.arange(len(hidden)) % config.vocab_size
    loss = jax.grad(lambda h, u: jnp.mean(softmax_cross_entropy(h, u, targets)), (0, 1))
    parts["loss"] = _milliseconds(jax.jit(loss), hidden, unembedding)

    mesh = devices_of(training_config.mesh)
    with use_mesh(mesh):
        plan = plan_state(training_config, mesh)

        def update(params, moments):
            updates, moments = plan.optimizer.update(params, moments, params)
            return jax.tree.map(lambda p, u: p - 3e-4 * u, params, updates), moments

        state, update = plan.initialize(), jax.jit(update, donate_argnums=(0, 1))
        seconds = []
        params, moments = state.params, state.opt_state
        for _ in range(6):
            begun = time.monotonic()
            params, moments = jax.block_until_ready(update(params, moments))
            seconds.append(time.monotonic() - begun)
        parts["optimizer"] = 1e3 * float(np.median(seconds[1:]))
    return {name: round(ms, 3) for name, ms in parts.items()}


def operator_and_inputs(config: ModelConfig, batch: int, length: int) -> tuple[Callable, list[jax.Array]]:
    """The mixer's operator alone, and inputs of the shapes that it has in the model."""
    keys = iter(jax.random.split(jax.random.key(1), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), (batch, length, *shape), config.dtype)

    heads, options = config.num_heads, {"implementation": config.implementation}
    key_width = round(config.expand_k * config.hidden_size) // heads
    value_width = round(config.expand_v * config.hidden_size) // heads
    if config.mixer == "attention":
        width = config.hidden_size // heads
        cudnn = "cudnn" if jax.default_backend() == "gpu" else "xla"
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=cudnn)
        return attend, [normal(heads, width) for _ in range(3)]
    if config.mixer == "gla":
        q, k, v, gates = (normal(heads, w) for w in (key_width, key_width, value_width, key_width))
        return functools.partial(gated_linear_attention, **options), [q, k, v, jax.nn.log_sigmoid(gates) / 16]
    if config.mixer == "retnet":
        q, k, v = (normal(heads, width) for width in (key_width, key_width, value_width))
        return (lambda q, k, v: retention(q, k, v, jnp.full(heads, -0.01), **options)), [q, k, v]
    inner, states = round(config.expand_v * config.hidden_size), config.state_size
    x, dt, b, c = normal(inner), jax.nn.softplus(normal(inner) - 4), normal(states), normal(states)
    rates = -jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states))
    return functools.partial(selective_scan, **options), [x, dt, rates, b, c, jnp.ones(inner)]


def _milliseconds(fn: Callable, *arguments: Any, rounds: int = 8) -> float:
    """Median time of ``fn``, queued four at a time so that the launch of one hides behind another."""
    jax.block_until_ready(fn(*arguments))
    seconds = []
    for _ in range(rounds):
        begun = time.monotonic()
        for _ in range(4):
            out = fn(*arguments)
        jax.block_until_ready(out)
        seconds.append((time.monotonic() - begun) / 4)
    return 1e3 * float(np.median(seconds))


def draw(rows: list[dict]) -> Callable:
    def draw_axes(axes):
        ran = [row for row in rows if "error" not in row]
        shapes = list(dict.fromkeys(row["shape"] for row in ran))
        for name in dict.fromkeys(_name(row) for row in ran):
            chosen = [row for row in ran if _name(row) == name]
            places = [shapes.index(row["shape"]) for row in chosen]
            axes[0].plot(places, [row["tokens_per_second"] / 1e3 for row in chosen], "o-", label=name)
            axes[1].plot(places, [row["peak_gib"] for row in chosen], "o-", label=name)
        for one, title in zip(axes, ("thousand tokens/s", "peak memory (GiB)"), strict=True):
            one.set_xticks(range(len(shapes)), shapes)
            one.set(title=title, xlabel="length x batch")
            one.set_ylim(bottom=0)
            one.grid(alpha=0.3)
        axes[0].legend(fontsize="small")

    return draw_axes


def _name(row: dict[str, Any]) -> str:
    parts = [row["model"]]
    parts += [row["implementation"]] if row["implementation"] != "fastest" else []
    parts += [f"remat {row['remat']}"] if row["remat"] != "none" else []
    parts += [row["mesh"]] if row.get("mesh") else []
    return ", ".join(parts)


def run(arguments: Arguments) -> None:
    gpu = jax.default_backend() == "gpu"
    models = arguments.models or ",".join(f"{model}-{'1.3b' if gpu else 'small-bytes'}" for model in MODELS)
    shapes = arguments.shapes or ("2048x8,4096x4,8192x2,16384x1" if gpu else "64x4,256x1")
    lists = [text.split(",") for text in (shapes, models, arguments.implementations, arguments.remat)]
    for preset in lists[1]:
        if preset not in PRESETS:
            raise UserError(f'models has "{preset}": choose from {", ".join(PRESETS)}')
    meshes = [None if mesh == "1" else mesh for mesh in arguments.meshes.split(",")]
    cases = [Case(model, shape, *how) for shape, model, *how in itertools.product(*lists, meshes)]
    for case in cases:
        # Refuses what makes no model, or a mesh that is not here, before anything is measured.
        devices_of(training(case, arguments.unroll_layers).mesh)
    settings = {"unroll_layers": arguments.unroll_layers, "steps": arguments.steps}
    results = ResultsFile(arguments.results / "throughput.json", settings)
    absent = [case for case in cases if results.find(**case._asdict()) is None]
    with ThreadPoolExecutor(arguments.compile_threads) as pool:
        compiling = {case: pool.submit(prepare, case, arguments.unroll_layers, arguments.profile) for case in absent}
        if arguments.compile_threads > 1:
            wait(compiling.values())
        for case in cases:
            if case in compiling:
                results.add(case._asdict() | _row(compiling.pop(case).result(), arguments))
            _say(results.find(**case._asdict()))
    plot(arguments.results / "throughput.png", draw(results.rows), columns=2)
    print(f"results: {results.path} and throughput.png beside it")


def _row(prepared: Prepared | str, arguments: Arguments) -> dict[str, Any]:
    if isinstance(prepared, str):
        return {"error": prepared}
    try:
        row = measure(prepared, arguments.steps)
        gc.collect()
        if arguments.parts and prepared.mesh.size == 1:
            row["parts_ms"] = time_parts(prepared.config)
    except (NotImplementedError, ValueError, RuntimeError) as error:  # the other rows are measured all the same
        row = {"error": _one_line(error)}
    gc.collect()
    return row


def _one_line(error: Exception) -> str:
    named = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return named + str(error).splitlines()[0]


def _say(row: dict[str, Any]) -> None:
    named = f"{_name(row)} {row['shape']}"
    if "error" in row:
        print(f"{named}: {row['error']}", flush=True)
        return
    mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f}%"
    each = f" ({row['tokens_per_second_per_device']:,.0f} a device)" if row.get("mesh") else ""
    parts = "".join(f", {name} {ms:.1f}" for name, ms in row.get("parts_ms", {}).items())
    print(
        f"{named}: {row['tokens_per_second']:,.0f} tokens/s{each}{mfu}, {row['peak_gib']:.1f} GiB, "
        f"{row['step_ms']:.1f} ms a step{parts and '; ms of its parts' + parts[1:]}",
        flush=True,
    )


def _shape(text: str) -> tuple[int, int]:
    length, x, batch = text.partition("x")
    if not (x and length.isdigit() and batch.isdigit() and int(length) and int(batch)):
        raise UserError(f'shapes has "{text}": give LENGTHxBATCH, such as 2048x8')
    return int(length), int(batch)


def _mesh(text: str | None) -> MeshConfig:
    sizes = {}
    for part in [] if text is None else text.split("x"):
        axis = re.fullmatch(rf"({'|'.join(AXES)})(\d+)", part)
        if axis is None or axis[1] in sizes:
            raise UserError(
                f'meshes has "{text}": give 1, or axes of {", ".join(AXES)}, such as data4 or fsdp2xtensor2'
            )
        sizes[axis[1]] = int(axis[2])
    return MeshConfig(**{"data": 1} | sizes)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(tyro.cli(Arguments, args=argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
