"""Speed and memory of generation: decode steps by batch, prompts, and what a state costs.

With no arguments: a tiny model on a CPU, GLA 1.3B in bf16 with random weights on a GPU. Every row says what share of
its limit a decode step has: the bytes that it must move (weights once; states read once and written once) over the
speed at which this device copies. A prompt is compared with the forward pass of training on the same tokens.

    --preset gla-340m --batches 1 8 64 --prompt 32768 --memory-lengths 1024 65536
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from glax.errors import UserError, exit_code
from glax.inference import Sampling, advance, start
from glax.models import PRESETS, Decoder, LanguageModel, cast, decoder
from provenance import provenance
from results_file import make_folder

GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured."""

    preset: str | None = None
    """Model. None: gla-1.3b on a GPU, gla-tiny elsewhere."""

    batches: tuple[int, ...] = (1, 64)
    """Rows that are decoded at once."""

    tokens: int = 256
    """Tokens of a timed decode loop."""

    prompt: int | None = None
    """Tokens of the long prompt. None: 32768 on a GPU, 512 elsewhere."""

    memory_lengths: tuple[int, ...] | None = None
    """Prompt lengths after which a decode loop's memory is read. None: 1024 and 65536; 64 and 1024 on a CPU."""

    rounds: int = 3
    """Repeats of each measurement, of which the median counts."""

    results: Path = Path("experiments/results/decode_speed")
    """Folder of the results."""

    name: str | None = None
    """Name of the files. None: device and preset."""


def build(preset: str) -> LanguageModel:
    """Random weights in the compute dtype."""
    config = PRESETS[preset]
    return jax.jit(lambda: cast(LanguageModel(config, rngs=nnx.Rngs(0)), config.dtype))()


def copy_bytes_per_second(rounds: int) -> float:
    """Bytes read and written per second by a copy of a large array."""
    size = 2**32 if jax.default_backend() == "gpu" else 2**26
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / median_seconds(lambda: jax.block_until_ready(x + 1.0), rounds)


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def step_bytes(model: LanguageModel, batch: int) -> tuple[int, int]:
    """Bytes of the weights that a step reads (an embedding is one row of its table), and of its states, once."""
    arrays = jax.tree.leaves(model)
    weights = sum(leaf.nbytes for leaf in arrays)
    if model.lm_head is not None:
        weights -= model.embedding[...].nbytes
    state = jax.eval_shape(lambda model: model.init_state(batch, 1), model)
    return weights, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def decode_row(
    name: str, model: LanguageModel | Decoder, batch: int, arguments: Arguments, copy_speed: float
) -> dict[str, Any]:
    """Tokens per second of a decode loop, and its share of the limit."""
    prompt = jnp.zeros((batch, 16), jnp.int32)
    decoding = start(model, prompt, None, max_new_tokens=arguments.tokens, seed=0)
    holder = [decoding]

    def loop():
        tokens, holder[0] = advance(model, holder[0], count=arguments.tokens, sampling=GREEDY, stop_token=None)
        jax.block_until_ready((tokens, holder[0]))

    begun = time.perf_counter()
    loop()
    first = time.perf_counter() - begun
    seconds = median_seconds(loop, arguments.rounds) / arguments.tokens
    weights, states = step_bytes(model.model if isinstance(model, Decoder) else model, batch)
    limit = (weights + 2 * states) / copy_speed
    return {
        "step": name,
        "batch": batch,
        "ms_per_step": 1e3 * seconds,
        "tokens_per_second": batch / seconds,
        "limit_tokens_per_second": batch / limit,
        "share_of_limit": limit / seconds,
        "weight_bytes": weights,
        "state_bytes": states,
        "first_call_seconds": first,
    }


def prompt_row(model: LanguageModel, length: int, rounds: int) -> dict[str, Any]:
    """Reading a prompt of one row into a state, beside the forward pass of training on it."""
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, model.config.vocab_size)
    prefill = jax.jit(lambda model, tokens: model.prefill(tokens, model.init_state(1, length)))
    forward = jax.jit(lambda model, tokens: model.hidden(tokens))
    read = median_seconds(lambda: jax.block_until_ready(prefill(model, tokens)), rounds)
    train = median_seconds(lambda: jax.block_until_ready(forward(model, tokens)), rounds)
    return {
        "prompt_tokens": length,
        "prefill_ms": 1e3 * read,
        "prefill_tokens_per_second": length / read,
        "training_forward_ms": 1e3 * train,
        "prefill_over_training_forward": read / train,
    }


def memory_row(model: Decoder, length: int) -> dict[str, Any]:
    """Bytes in use while decoding after a prompt of ``length``, read in pieces of at most 8192."""
    prefix = jax.jit(lambda model: model.init_state(1, length))(model)
    read = jax.jit(lambda model, tokens, state: model.read(tokens, state)[1], donate_argnums=2)
    piece = min(length, 8192)
    for _ in range(length // piece):
        prefix = read(model, jnp.zeros((1, piece), jnp.int32), prefix)
    decoding = start(model, jnp.zeros((1, 1), jnp.int32), None, max_new_tokens=64, seed=0, prefix=prefix)
    del prefix
    compiled = advance.lower(model, decoding, count=64, sampling=GREEDY, stop_token=None).compile()
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    tokens, decoding = advance(model, decoding, count=64, sampling=GREEDY, stop_token=None)
    jax.block_until_ready(tokens)
    in_use = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(decoding.state))
    return {"length": length, "state_bytes": state, "loop_temporary_bytes": temporary, "bytes_in_use": in_use}


def measure(arguments: Arguments) -> dict[str, Any]:
    """All rows, written after each; one that fails is a row with its error."""
    gpu = jax.default_backend() == "gpu"
    preset = arguments.preset or ("gla-1.3b" if gpu else "gla-tiny")
    if preset not in PRESETS:
        raise UserError(f"--preset: {preset} is not one of {', '.join(PRESETS)}")
    default = f"{jax.devices()[0].device_kind}-{preset}".lower().replace(" ", "-")
    path = arguments.results / f"{arguments.name or default}.json"
    make_folder(path)
    copy_speed = copy_bytes_per_second(arguments.rounds)
    content = {
        "ran_on": provenance(),
        "preset": preset,
        "parameters": PRESETS[preset].num_parameters(),
        "dtype": PRESETS[preset].compute_dtype,
        "copy_gb_per_s": copy_speed / 1e9,
        "limit": "weights read once, states read and written once, at the copy speed of this run",
        "rows": [],
    }

    def add(row: Callable[[], dict[str, Any]], **names: Any) -> None:
        try:
            done = row()
        except Exception as error:
            done = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        content["rows"].append(names | done)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(content["rows"][-1]), flush=True)

    model = build(preset)
    fast = decoder(model)
    add(
        functools.partial(prompt_row, model, arguments.prompt or (32768 if gpu else 512), arguments.rounds),
        what="prompt",
    )
    for batch in arguments.batches:
        add(functools.partial(decode_row, "decoder", fast, batch, arguments, copy_speed), what="decode")
    for length in arguments.memory_lengths or ((1024, 65536) if gpu else (64, 1024)):
        add(functools.partial(memory_row, fast, length), what="memory")
    few = dataclasses.replace(arguments, tokens=min(arguments.tokens, 32))
    for batch in arguments.batches:
        add(functools.partial(decode_row, "LanguageModel.step", model, batch, few, copy_speed), what="decode")
    print(f"results: {path}", file=sys.stderr)
    return content


def run(argv: list[str]) -> None:
    measure(tyro.cli(Arguments, args=argv, description=__doc__))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
