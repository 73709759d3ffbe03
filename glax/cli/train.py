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

from glax.training import RECIPES, TrainConfig, recipe, train

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


def run(argv: list[str]) -> None:
    arguments = parse(argv)
    folder = arguments.runs / (arguments.name or arguments.preset)
    result = train(arguments.train, folder)
    last = result.validations[-1]
    state = "was complete" if result.already_complete else "is complete"
    print(
        f"{folder} {state}: {last['step']} steps, validation perplexity {last['validation_perplexity']:.4g} per token"
    )
    print(f"continue a prompt with it: glax generate {folder} --prompt TEXT")


def parse(argv: list[str]) -> Arguments:
    """Arguments of a command line; what it does not say comes from the preset that it names."""
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
    description = f"{__doc__}\nPresets: {', '.join(RECIPES)}."
    defaults = Arguments(config, preset=preset)
    return tyro.cli(Arguments, args=argv, default=defaults, prog="glax train", description=description)
