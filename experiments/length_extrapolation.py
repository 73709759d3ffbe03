"""Perplexity past the training length (paper, Figure 5): models read held-out text much longer than their rows were.

Trainings, named MODEL or MODEL:FORM, all of the same number of bytes a step:

    gla, retnet, mamba, transformer    rows of --length
    gla:x4                             rows four times as long, trained directly
    gla:12s                            12 segments of --length: the state is carried from each to the next, and no
                                       gradient passes between them (any number; any model but the transformer)

With no arguments: gla, gla:4s, retnet and transformer, small, on bytes of Python's standard library, in about a minute
on a CPU. Real text, larger, on a GPU:

    --data books/ --trainings gla,gla:x4,gla:12s,retnet,mamba,transformer --width 256 --layers 4 --length 256
    --batch 32 --steps 1200 --seeds 3

All seeds of a training train in one program. Held-out text is read --times the length from an empty state; perplexity
per byte is by position, in buckets of half a length. The same command continues after the rows that are there, and
within a training from a copy that it keeps every two minutes.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int

from byte_text import VOCABULARY, ByteText, load_text, token_losses, window_loss
from glax.errors import UserError, exit_code
from glax.models import LanguageModel, ModelConfig
from many_runs import text_windows
from results_file import ResultsFile, plot
from text_training import train_on_text


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train, on what, and how far to read."""

    data: str | None = None
    """Text: a file, a folder or a glob. None: the sources of Python's standard library."""

    trainings: str = "gla,gla:4s,retnet,transformer"
    """Comma-separated, see above."""

    width: int = 64
    """Width of the residual stream; heads are 4."""

    layers: int = 2
    """Blocks (Mamba has twice as many, without MLP)."""

    length: int = 64
    """Bytes in a row, or in a segment."""

    batch: int = 16
    """Rows of a step; longer ones are fewer."""

    steps: int = 150
    """Steps of each run."""

    seeds: int = 2
    """Runs of each training; they differ in initial parameters and in batches."""

    learning_rate: float = 4e-3
    """Peak learning rate; a tenth of the steps warm up, then a cosine to a tenth of it."""

    times: int = 8
    """How many lengths of held-out text to read."""

    implementation: str | None = None
    """Kernel of the recurrent models. None: the fastest that runs here."""

    turn: Path | None = None
    """A file: commands that name the same one compile side by side and train one after the other."""

    results: Path = Path("runs/length_extrapolation")
    """Folder of length_extrapolation.json and length_extrapolation.png."""


def model_config(model: str, arguments: Arguments) -> ModelConfig:
    """Parameters of all models are within 2% of GLA's at widths that are multiples of 256, and near elsewhere."""
    width = arguments.width
    models = {
        "gla": {},
        "transformer": {"mixer": "attention"},
        # Retention's 4 d^2 more are taken from the MLP.
        "retnet": {"mixer": "retnet", "expand_k": 1.0, "expand_v": 2.0, "mlp_size": _mlp_width(width) - 4 * width // 3},
        "mamba": {"mixer": "mamba", "expand_v": 2.0, "mlp_size": 0, "num_layers": 2 * arguments.layers},
    }
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_layers=arguments.layers,
        num_heads=4,
        compute_dtype="bfloat16" if jax.default_backend() == "gpu" else "float32",
        implementation=None if model == "transformer" else arguments.implementation,
    )
    return dataclasses.replace(config, **models[model])


def _mlp_width(width: int) -> int:
    return ModelConfig(hidden_size=width).mlp_width


def segment_loss(model: LanguageModel, windows: Int[Array, "B NT+1"], segments: int) -> Float[Array, ""]:
    """Mean loss of windows read segment by segment: each from the state that the one before left, held constant."""
    rows, length = windows.shape[0], (windows.shape[1] - 1) // segments

    def by_segment(tokens):
        return tokens.reshape(rows, segments, length).swapaxes(0, 1)

    def read(state, tokens_and_targets):
        tokens, targets = tokens_and_targets
        hidden, state = model.read(tokens, jax.lax.stop_gradient(state))
        return state, jnp.mean(token_losses(model, hidden, targets))

    state = model.init_state(rows, segments * length)
    _, losses = jax.lax.scan(read, state, (by_segment(windows[:, :-1]), by_segment(windows[:, 1:])))
    return jnp.mean(losses)


def parse(training: str) -> tuple[str, int, int]:
    """Model, lengths in a row, and segments that a row is cut into."""
    match = re.fullmatch(r"(gla|retnet|mamba|transformer)(?::(x\d+|\d+s))?", training)
    if match is None:
        raise UserError(f'trainings has "{training}": write gla, retnet, mamba or transformer, with :x4 or :12s or not')
    model, form = match.groups()
    count = int((form or "1").strip("xs"))
    segments = count if form and form.endswith("s") else 1
    if count < 1 or (model == "transformer" and segments > 1):
        raise UserError(f'trainings has "{training}": a form needs at least one length, and a transformer no segments')
    return model, count, segments


def train(training: str, arguments: Arguments, text: ByteText) -> dict:
    """Trains all seeds of one training and reads past its length: a row of the results."""
    model, lengths, segments = parse(training)
    config = model_config(model, arguments)
    rows = max(1, round(arguments.batch / lengths))

    def loss(model, windows):
        return window_loss(model, windows) if segments == 1 else segment_loss(model, windows, segments)

    bucket = max(1, arguments.length // 2)

    def by_position(model, windows):
        losses = token_losses(model, model.hidden(windows[:, :-1]), windows[:, 1:])
        return jnp.mean(losses.reshape(len(windows), -1, bucket), (0, 2))

    windows = text.held_out_windows(arguments.times * arguments.length, max(1, arguments.batch // arguments.times), 32)
    _, by_bucket, seconds = train_on_text(
        training,
        config,
        text,
        arguments,
        sample=text_windows(lengths * arguments.length, rows),
        loss=loss,
        looks=5,
        metrics=by_position,
        held_out=windows,
    )
    return {
        "training": training,
        "parameters": config.num_parameters(),
        "tokens": arguments.steps * rows * lengths * arguments.length,
        "training_length": lengths * arguments.length,
        "segments": segments,
        "bucket": bucket,
        "perplexity": np.exp(by_bucket).round(4).tolist(),
        "held_out_bytes_read": windows.shape[0] * windows.shape[1] * (windows.shape[2] - 1),
        "seconds": seconds,
    }


def past_the_length(row: dict, length: int) -> np.ndarray:
    """Of each seed: perplexity of all positions past ``length``, over that of the last bucket within it."""
    losses = np.log(row["perplexity"])
    within = length // row["bucket"]
    return np.exp(losses[:, within:].mean(1) - losses[:, within - 1])


def draw(rows: list[dict], arguments: Arguments) -> Callable:
    def draw_axes(axes):
        for row in rows:
            perplexity = np.array(row["perplexity"])
            positions = row["bucket"] * (np.arange(perplexity.shape[1]) + 0.5)
            [line] = axes.plot(positions, perplexity.mean(0), "o-", markersize=3, label=row["training"])
            axes.fill_between(positions, perplexity.min(0), perplexity.max(0), color=line.get_color(), alpha=0.2)
        axes.axvline(arguments.length, color="grey", linestyle="--", linewidth=1)
        best = min(np.min(row["perplexity"]) for row in rows)
        axes.set_ylim(0.97 * best, min(2.5 * best, 1.03 * max(np.max(row["perplexity"]) for row in rows)))
        axes.set(xlabel="position (bytes; dashed: the training length)", ylabel="perplexity per byte")
        axes.grid(alpha=0.3)
        axes.legend()

    return draw_axes


def run(arguments: Arguments) -> None:
    trainings = arguments.trainings.split(",")
    for training in trainings:
        model_config(parse(training)[0], arguments)
    if min(arguments.steps, arguments.seeds, arguments.batch) < 1 or arguments.length < 2 or arguments.length % 2:
        raise UserError("steps, seeds and batch must be at least 1, length an even number")
    if arguments.times < 2:
        raise UserError(f"times is {arguments.times}: reading past the length needs at least 2")
    text = load_text(arguments.data)
    left_out = ("trainings", "results", "data", "turn")
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in left_out}
    results = ResultsFile(arguments.results / "length_extrapolation.json", settings | text.described())
    for training in trainings:
        if results.find(training=training) is None:
            results.add(train(training, arguments, text))
    print("training      parameters  perplexity at 1 length, at the end   past the length / at it, by seed")
    for training in trainings:
        row = results.find(training=training)
        perplexity, within = np.array(row["perplexity"]).mean(0), arguments.length // row["bucket"]
        ratios = " ".join(f"{ratio:.3f}" for ratio in past_the_length(row, arguments.length))
        print(
            f"{training:12}{row['parameters']:>12,}  {perplexity[within - 1]:>12.4f}{perplexity[-1]:>14.4f}"
            f"           {ratios}"
        )
    plot(arguments.results / "length_extrapolation.png", draw(results.rows, arguments))
    print(f"results: {results.path} and length_extrapolation.png beside it")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(tyro.cli(Arguments, args=argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
