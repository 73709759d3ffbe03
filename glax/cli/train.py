"""Train a language model in a run folder; start the same command again and it continues.

With no arguments: a small model on bytes, on the sources of Python's standard library. Your own text:

    glax train --data.train books/ --data.validation held-out.txt --name books

--preset brings a model and its settings; every other argument changes one of them.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import tyro

from glax.training import RECIPES, ProcessConfig, TrainConfig, join, process_config, recipe, train

DEFAULT_PRESET = "gla-small-bytes"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A training run and its folder."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]

    preset: str = DEFAULT_PRESET
    """Model and settings to start from."""

    name: str | None = None
    """Name of the run; its folder is RUNS/NAME. None: the preset's name."""

    runs: Path = Path("runs")
    """Folder of all runs."""

    processes: ProcessConfig = dataclasses.field(default_factory=ProcessConfig)
    """How this process finds the others of a run of several."""


def run(argv: list[str]) -> None:
    join(process_config(argv))
    argv, preset, config = from_preset(argv)
    description = f"{__doc__}\nPresets: {', '.join(RECIPES)}."
    defaults = Arguments(config, preset=preset)
    arguments = tyro.cli(Arguments, args=argv, default=defaults, prog="glax train", description=description)
    folder = arguments.runs / (arguments.name or arguments.preset)
    result = train(arguments.train, folder)
    if jax.process_index() != 0:
        return
    last = result.validations[-1]
    state = "was complete" if result.already_complete else "is complete"
    print(
        f"{folder} {state}: {last['step']} steps, validation perplexity {last['validation_perplexity']:.4g} per token"
    )
    print(f"continue a prompt with it: glax generate {folder} --prompt TEXT")


def from_preset(argv: list[str]) -> tuple[list[str], str, TrainConfig]:
    """A command line with `--mesh auto` as the flag that it stands for, the preset that it names, and its settings."""
    for position in range(len(argv) - 1):
        if argv[position : position + 2] == ["--mesh", "auto"]:
            argv = [*argv[:position], "--mesh.auto", *argv[position + 2 :]]
            break
    preset = DEFAULT_PRESET
    for position, argument in enumerate(argv):
        if argument == "--preset" and position + 1 < len(argv):
            preset = argv[position + 1]
        elif argument.startswith("--preset="):
            preset = argument.removeprefix("--preset=")
    config = recipe(preset)
    if jax.default_backend() == "cpu":
        # CPUs have no bf16 arithmetic: it is emulated, slowly.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="float32"))
    return argv, preset, config
