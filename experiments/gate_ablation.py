"""The gate ablation (paper, Table 4): the same model with other gates, at equal tokens and (within 2%) parameters.

    channel  GLA: a data-dependent decay of each key channel        none    no decay, linear attention
    scalar   one data-dependent decay per head                      8 heads, 1 head    GLA with other heads
    fixed    RetNet's constants, one per head

With no arguments: the first four, small, on bytes of Python's standard library, in minutes on a CPU. Real text,
larger, on a GPU:

    --data books/ --width 256 --layers 4 --length 512 --batch 16 --steps 1200 --seeds 3

All seeds of a variant train in one program. Training perplexity is that of the mean loss of the last tenth of the
steps, held-out perplexity is of windows of the same length, both per byte. The same command continues after the rows
that are there, and within a variant from a copy that it keeps every two minutes.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro

from byte_text import VOCABULARY, ByteText, load_text, window_loss
from glax.errors import UserError, exit_code
from glax.models import ModelConfig
from many_runs import text_windows
from results_file import ResultsFile, plot
from text_training import train_on_text

VARIANTS = {
    "channel": {},
    "scalar": {"gate": "scalar"},
    "fixed": {"gate": "fixed"},
    "none": {"gate": "none"},
    "8 heads": {"num_heads": 8},
    "1 head": {"num_heads": 1},
}
# Table 4: training perplexity of the 340M model after 7 B tokens.
PAPER = {"channel": 14.77, "scalar": 15.56, "fixed": 16.55, "none": 23.21, "8 heads": 15.29, "1 head": 14.61}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train, on what."""

    data: str | None = None
    """Text: a file, a folder or a glob. None: the sources of Python's standard library."""

    variants: str = "channel,scalar,fixed,none"
    """Comma-separated, see above."""

    width: int = 64
    """Width of the residual stream; heads are 4."""

    layers: int = 2
    """Blocks."""

    length: int = 128
    """Bytes in a row."""

    batch: int = 8
    """Rows of a step."""

    steps: int = 200
    """Steps of each run."""

    seeds: int = 2
    """Runs of each variant; they differ in initial parameters and in batches."""

    learning_rate: float = 4e-3
    """Peak learning rate; a tenth of the steps warm up, then a cosine to a tenth of it."""

    implementation: str | None = None
    """Kernel of the recurrence. None: the fastest that runs here."""

    turn: Path | None = None
    """A file: commands that name the same one compile side by side and train one after the other."""

    results: Path = Path("runs/gate_ablation")
    """Folder of gate_ablation.json and gate_ablation.png."""


def model_config(variant: str, arguments: Arguments) -> ModelConfig:
    return dataclasses.replace(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.width,
            num_layers=arguments.layers,
            num_heads=4,
            compute_dtype="bfloat16" if jax.default_backend() == "gpu" else "float32",
            implementation=arguments.implementation,
        ),
        **VARIANTS[variant],
    )


def train(variant: str, arguments: Arguments, text: ByteText) -> dict:
    """Trains all seeds of one variant: a row of the results."""
    config = model_config(variant, arguments)
    held_out = text.held_out_windows(arguments.length, arguments.batch, 32)
    losses, held_out_losses, seconds = train_on_text(
        variant,
        config,
        text,
        arguments,
        sample=text_windows(arguments.length, arguments.batch),
        loss=window_loss,
        looks=10,
        metrics=window_loss,
        held_out=held_out,
    )
    last = losses[-max(1, arguments.steps // 10) :].mean(0)
    return {
        "variant": variant,
        "parameters": config.num_parameters(),
        "tokens": arguments.steps * arguments.batch * arguments.length,
        "training_perplexity": np.exp(last).round(4).tolist(),
        "held_out_perplexity": np.exp(held_out_losses).round(4).tolist(),
        "training_loss": losses[:: max(1, arguments.steps // 100)].mean(1).round(4).tolist(),
        "seconds": seconds,
    }


def draw(rows: list[dict]) -> Callable:
    def draw_axes(axes):
        names = [row["variant"] for row in rows]
        for shift, kind in ((-0.2, "training_perplexity"), (0.2, "held_out_perplexity")):
            means = [np.mean(row[kind]) for row in rows]
            axes.bar(np.arange(len(rows)) + shift, means, 0.38, label=kind.replace("_", " "), alpha=0.8)
            for place, row in enumerate(rows):
                axes.plot([place + shift] * len(row[kind]), row[kind], "k.", markersize=4)
        values = [value for row in rows for value in row["training_perplexity"] + row["held_out_perplexity"]]
        axes.set_ylim(0.97 * min(values), 1.02 * max(values))
        axes.set_xticks(range(len(rows)), names)
        axes.set(ylabel="perplexity per byte", title="gates (dots: seeds)")
        axes.legend()

    return draw_axes


def run(arguments: Arguments) -> None:
    variants = arguments.variants.split(",")
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f'variants has "{variant}": choose from {", ".join(VARIANTS)}')
        model_config(variant, arguments)
    if min(arguments.steps, arguments.seeds, arguments.length, arguments.batch) < 1:
        raise UserError("steps, seeds, length and batch must be at least 1")
    text = load_text(arguments.data)
    left_out = ("variants", "results", "data", "turn")
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in left_out}
    results = ResultsFile(arguments.results / "gate_ablation.json", settings | text.described(), paper=PAPER)
    for variant in variants:
        if results.find(variant=variant) is None:
            results.add(train(variant, arguments, text))
    print(f"{'gate':9}{'parameters':>11}  training perplexity     held-out perplexity     paper (340M, training)")
    for variant in variants:
        row = results.find(variant=variant)
        training, held_out = (_spread(row[f"{kind}_perplexity"]) for kind in ("training", "held_out"))
        print(f"{variant:9}{row['parameters']:>11,}  {training:24}{held_out:24}{PAPER[variant]}")
    plot(arguments.results / "gate_ablation.png", draw(results.rows))
    print(f"results: {results.path} and gate_ablation.png beside it")


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return f"{np.mean(values):.4f} ± {spread:.4f}"


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(tyro.cli(Arguments, args=argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
