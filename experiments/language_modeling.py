"""Train a gated linear attention language model.

With no arguments: a small model on bytes, on the sources of Python's standard library, in minutes on a CPU.
The run is a folder, runs/NAME, with config.json, metrics.jsonl, checkpoints/ and loss.png. Stopped or killed, it
continues where it was when the same command is started again.

Your own text (files, folders, globs, JSONL or Parquet with a "text" field):

    --data.train books/ --data.validation held-out.txt --name books

The paper's 340M model on SlimPajama, on eight GPUs, with another kernel:

    --preset gla-340m --data.train hub:DKYoon/SlimPajama-6B --mesh.fsdp 8 --implementation xla

--preset chooses the model and the settings that come with it; every other argument changes one of them, and the
values shown below are those of the chosen preset.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from glax.cli.train import DEFAULT_PRESET, from_preset
from glax.data import prepare, validation_batches
from glax.errors import exit_code
from glax.inference import Sampling, generate
from glax.training import (
    RECIPES,
    ProcessConfig,
    TrainConfig,
    TrainResult,
    join,
    leave,
    plot_losses,
    process_config,
    train,
)
from provenance import provenance
from results_file import writing


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line holds: a training run, its folder, and the text sampled at its end."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]

    preset: str = DEFAULT_PRESET
    """Model and settings to start from."""

    name: str | None = None
    """Name of the run; its folder is RUNS/NAME. None: the preset's name."""

    runs: Path = Path("runs")
    """Folder of all runs."""

    implementation: str | None = None
    """Kernel of gated linear attention: reference, xla, mosaic_gpu, ... None: the fastest that runs here."""

    sample_tokens: int = 256
    """Length of the sampled continuation. 0: none."""

    prompt: str | None = None
    """Text to continue. None: the beginning of a validation document."""

    temperature: float = 0.7
    """Temperature of the sampling."""

    processes: ProcessConfig = dataclasses.field(default_factory=ProcessConfig)
    """How this process finds the others of a run of several."""

    results: Path | None = None
    """Also write the curves to this JSON file, with the settings and what they ran on, and beside it their plot."""


def parse(argv: list[str]) -> Arguments:
    """Arguments of a command line; what it does not say comes from the preset that it names."""
    argv, preset, config = from_preset(argv)
    description = f"{__doc__}\nPresets: {', '.join(RECIPES)}."
    arguments = tyro.cli(Arguments, args=argv, default=Arguments(config, preset=preset), description=description)
    Sampling(arguments.temperature)  # says what is wrong with it before the training
    if arguments.implementation is not None:
        model = dataclasses.replace(arguments.train.model, implementation=arguments.implementation)
        arguments = dataclasses.replace(arguments, train=dataclasses.replace(arguments.train, model=model))
    return arguments


def run(argv: list[str]) -> None:
    join(process_config(argv))
    arguments = parse(argv)
    config = arguments.train
    folder = arguments.runs / (arguments.name or arguments.preset)
    say(
        f"{arguments.preset}: {config.model.num_parameters() / 1e6:.1f} M parameters, {config.steps} steps of "
        f"{config.data.batch_size} x {config.data.sequence_length} tokens, {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s), run folder {folder}"
    )
    result = train(config, folder)
    report(result, folder)
    if arguments.results is not None and jax.process_index() == 0:
        write_results(result, arguments)
    if jax.process_count() > 1:
        return  # a process alone has not all of the model to sample from
    if arguments.sample_tokens > 0 and not result.already_complete:
        sample(result, arguments)


def report(result: TrainResult, folder: Path) -> None:
    first, last = result.validations[0], result.validations[-1]
    start, end = first["validation_bits_per_byte"], last["validation_bits_per_byte"]
    if result.already_complete:
        say(f"the run in {folder} is complete: {last['step']} steps. Give --name another name to train again.")
    say(f"validation bits per byte: {start:.4f} at the start, {end:.4f} at the end ({100 * end / start:.0f}%)")
    say(f"validation perplexity: {last['validation_perplexity']:.4g} per token")
    say(f"waiting for data: {100 * result.data_wait:.2f}% of training time")
    say(f"curves: {folder / 'loss.png'} and {folder / 'metrics.jsonl'}")


def write_results(result: TrainResult, arguments: Arguments) -> None:
    """The validation curve, and the training loss of every tenth step, as one JSON file."""
    steps = [record for record in result.records if "loss" in record]
    content = {
        "preset": arguments.preset,
        "config": dataclasses.asdict(arguments.train),
        "parameters": arguments.train.model.num_parameters(),
        "ran_on": provenance(),
        "validation": result.validations,
        "training": [{"step": r["step"], "loss": r["loss"]} for r in steps if r["step"] % 10 == 0],
        "training_seconds": sum(record["seconds"] for record in steps),
        "data_wait": result.data_wait,
    }
    with writing(arguments.results):
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(content, indent=1) + "\n")
        plot_losses(result.records, arguments.results.with_suffix(".png"), arguments.name or arguments.preset)
    say(f"results: {arguments.results}")


def sample(result: TrainResult, arguments: Arguments) -> None:
    """Print a prompt and what the model makes of it."""
    config, tokenizer = arguments.train, result.tokenizer
    if arguments.prompt is not None:
        prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(arguments.prompt)])
    else:
        row = next(iter(validation_batches(prepare(config.data, quiet=True), config.data)))
        prompt = row["tokens"][0, : min(64, config.data.sequence_length // 2)]
    prompt = jnp.asarray(prompt, jnp.int32)[None]
    tokens = generate(
        result.model,
        prompt,
        jnp.array([prompt.shape[1]]),
        max_new_tokens=arguments.sample_tokens,
        temperature=arguments.temperature,
        seed=config.seed,
    )
    say(f"\nsample, after the prompt {tokenizer.decode(prompt[0])!r}:\n{tokenizer.decode(tokens[0])}")


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    leave(main())
