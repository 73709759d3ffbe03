"""Multi-query associative recall (paper, Figure 4): accuracy against model width, after Arora et al. 2023, "Zoology".

A row lists keys and values, k1 v1 k2 v2 ..., and then asks for each key once more, at a random place. The model must
give its value. With no arguments: a small task, on which GLA goes from nothing to all in about a minute on a CPU.
The paper's first task, on a GPU (--task l512 for the second), all models, widths and learning rates:

    --task l256 --models gla,retnet,mamba,transformer --widths 64,128,256,512

All learning rates and seeds of one model and width train in one program; its row in the JSON is renewed at each look at
the test accuracy, and the same command continues with what is not finished. A program ends early when for every seed
some learning rate is above 0.99. "best" in a row is the learning rate with the highest mean accuracy over the seeds.
Several such commands share a GPU with --turn.

As in Zoology: 100,000 training and 3,000 test examples, AdamW with weight decay 0.1 and a cosine to 0 without warm-up,
no MLP, tied embeddings, two layers for attention and four for the others. Not as there: RMSNorm for LayerNorm, rotary
positions in attention for learned ones, gradients clipped at norm 1, batches drawn with replacement, and on a GPU
bfloat16 products; --dtype float32 has them exact. Two options, the same for every model, find recall in far fewer steps
and are in Zoology's later experiments: --convolution, and --curriculum, shorter rows of fewer pairs first.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float

from glax.errors import UserError, exit_code
from glax.layers import Linear, RMSNorm, ShortConvolution
from glax.models import LanguageModel, ModelConfig
from many_runs import ManyRuns, Training, turn
from mqar_examples import TASKS, Examples, Task, examples
from results_file import ResultsFile, plot

CONV_WIDTH = 4
PAPER_RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)
MODELS = {
    "gla": {"mixer": "gla", "num_layers": 4},
    "retnet": {"mixer": "retnet", "num_layers": 4, "expand_k": 1.0, "expand_v": 2.0},
    "mamba": {"mixer": "mamba", "num_layers": 4, "expand_v": 2.0},
    "transformer": {"mixer": "attention", "num_layers": 2},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The sweep."""

    task: Literal["small", "l256", "l512"] = "small"
    """Which examples: small ones, or those of the two halves of Figure 4."""

    models: str = "gla"
    """Comma-separated: gla, retnet, mamba, transformer."""

    widths: str = "32"
    """Comma-separated widths of the residual stream."""

    learning_rates: str | None = None
    """Comma-separated peak learning rates. None: 0.002 for small, else the paper's four."""

    seeds: int = 1
    """Runs of each learning rate; they differ in initial parameters and in batches."""

    steps: int | None = None
    """Steps of a run, at most. None: the task's."""

    batch: int | None = None
    """Rows of a step. None: the task's."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrix products. None: bfloat16 on a GPU."""

    implementation: str | None = None
    """Kernel of the recurrent models. None: the fastest that runs here."""

    layers: int | None = None
    """Blocks of each model. None: two for attention and four for the others."""

    convolution: bool = False
    """A causal convolution layer of 4 taps in front of the first block of every model: what it takes to see the token
    before need not be learned by the mixers, and recall is found in hundreds of steps. Zoology's later experiments have
    one before every mixer."""

    initial_std: float = 0.02
    """Of the initial matrices."""

    curriculum: str = ""
    """Comma-separated TIMES:SHARE: for this share of the steps rows are so many times shorter, with so many times fewer
    pairs, and so many times more of them in a step. The paper's task follows. E.g. 4:0.3,2:0.2."""

    evaluate_every: int = 100
    """Steps between looks at the test accuracy."""

    seconds: float | None = None
    """Steps of a model and width are so few that training fits in this, by the speed of the first. None: all steps."""

    turn: Path | None = None
    """A file: commands that name the same one compile side by side and train one after the other."""

    results: Path = Path("runs/mqar")
    """Folder of mqar.json and mqar.png."""


class ConvolvedModel(LanguageModel):
    """A language model with a convolution layer in front of its first block: x + silu(conv(norm(x) W)) W', x the
    embeddings, conv causal with 4 taps for each channel."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width, dtype = config.hidden_size, config.dtype
        options = {"std": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.conv_norm = RMSNorm(width, axes=("embed",), eps=config.norm_eps, dtype=dtype)
        self.conv_in = Linear(width, width, axes=("embed", "mlp"), **options)
        self.conv = ShortConvolution(width, CONV_WIDTH, axis="mlp", dtype=dtype, rngs=rngs)
        self.conv_out = Linear(width, width, axes=("mlp", "embed"), **options)

    def _embed(self, tokens):
        x = super()._embed(tokens)
        return x + self.conv_out(self.conv(self.conv_in(self.conv_norm(x)))[0])


def loss_and_accuracy(model: LanguageModel, rows: Examples) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the answers in nats, and the share of them that is the most likely token."""
    hidden = jnp.take_along_axis(model.hidden(rows.tokens), rows.places[..., None], 1)
    logits = jnp.dot(hidden, model.unembedding(), preferred_element_type=jnp.float32)
    log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.answers[..., None], -1)
    return -jnp.mean(log_probability), jnp.mean(jnp.argmax(logits, -1) == rows.answers)


def model_config(model: str, width: int, task: Task, arguments: Arguments) -> ModelConfig:
    dtype = arguments.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    return ModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=width,
        num_heads=2,
        mlp_size=0,
        tie_embeddings=True,
        initializer_range=arguments.initial_std,
        compute_dtype=dtype,
        implementation=arguments.implementation,
        **MODELS[model] | ({} if arguments.layers is None else {"num_layers": arguments.layers}),
    )


def curriculum(task: Task, arguments: Arguments) -> list[tuple[Task, float]]:
    """The tasks to train on, each up to a share of the steps; the last is ``task``."""
    stages, end = [], 0.0
    for stage in filter(None, arguments.curriculum.split(",")):
        try:
            times, share = int(stage.split(":")[0]), float(stage.split(":")[1])
        except (ValueError, IndexError) as error:
            raise UserError(f'curriculum has "{stage}": write TIMES:SHARE, such as 4:0.3') from error
        end += share
        if times < 1 or task.pairs % times or task.length % times or share <= 0 or end >= 1:
            raise UserError(
                f'curriculum has "{stage}": TIMES divides length and pairs, and shares of the steps sum to less than 1'
            )
        stages.append((task.shortened(times), end))
    return [*stages, (task, 1.0)]


def sweep(model: str, width: int, task: Task, arguments: Arguments, data: "Data", results: ResultsFile) -> None:
    """Trains every learning rate and seed of one model and width, and keeps their row of the results up to date."""
    every = arguments.evaluate_every
    runs = make_runs(model, width, task, arguments, data)
    size = min(250, task.test_examples)
    batches = jax.tree.map(lambda x: x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]), data.test)
    runs.compile(min(every, task.steps), *data.train)
    runs.evaluate(loss_and_accuracy, batches)

    copy, row = arguments.results / f"{model}-{width}.npz", results.find(model=model, width=width)
    curve = row["curve"] if row and copy.exists() else []
    with turn(arguments.turn):
        if curve:
            runs.steps = row["steps_of_schedule"]
        elif arguments.seconds is not None:
            fitting = int(arguments.seconds / runs.seconds_for(min(every, task.steps)))
            runs.steps = min(task.steps, max(1, fitting) * every)
        started = time.monotonic()
        for rows, share in zip(data.train, data.until, strict=True):
            runs.data = rows
            until = runs.steps if share == 1 else round(share * runs.steps / every) * every
            for losses in runs.train(every, copy, until):
                _, accuracy = runs.evaluate(loss_and_accuracy, batches)
                accuracy = accuracy.astype(float).reshape(-1, arguments.seeds)
                loss = losses.astype(float).mean(0).reshape(accuracy.shape)
                seconds = time.monotonic() - started
                print(
                    f"{model} {width}: step {runs.step}/{runs.steps}, loss {loss.mean(1).round(3).tolist()}, "
                    f"accuracy {accuracy.mean(1).round(3).tolist()}, {seconds:.1f} s",
                    flush=True,
                )
                point = {"step": runs.step, "accuracy": accuracy.round(4).tolist(), "loss": loss.round(4).tolist()}
                curve = [*(point for point in curve if point["step"] < runs.step), point]
                now = {"model": model, "width": width, **outcome(runs, accuracy, learning_rates(arguments))}
                now |= {"curve": curve, "seconds": round(seconds, 1)}
                row = results.add(now, replacing=row)
                if row["finished"]:
                    copy.unlink(missing_ok=True)
                    return


def make_runs(model: str, width: int, task: Task, arguments: Arguments, data: "Data") -> ManyRuns:
    """Every learning rate and seed. A step has as many tokens in the shorter rows of a curriculum."""

    def sample(key, rows):
        count, length = rows.tokens.shape
        chosen = jax.random.randint(key, (task.batch * task.length // length,), 0, count)
        return jax.tree.map(lambda x: x[chosen], rows)

    return ManyRuns(
        model_config(model, width, task, arguments),
        sample,
        lambda model, rows: loss_and_accuracy(model, rows)[0],
        Training(steps=task.steps, weight_decay=0.1, beta2=0.999),
        data=data.train[-1],
        learning_rates=learning_rates(arguments),
        seeds=tuple(range(arguments.seeds)),
        model=ConvolvedModel if arguments.convolution else LanguageModel,
    )


def outcome(runs: ManyRuns, accuracy: Float[np.ndarray, "rates seeds"], rates: tuple[float, ...]) -> dict[str, object]:
    """What a row says of the runs where they stand."""
    best, solved = int(np.argmax(accuracy.mean(1))), bool(np.all(accuracy.max(0) > 0.99))
    return {
        "finished": solved or runs.step == runs.steps,
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(runs.params)),
        "layers": runs.config.num_layers,
        "dtype": runs.config.compute_dtype,
        "steps": runs.step,
        "steps_of_schedule": runs.steps,
        "learning_rates": rates,
        "seeds": accuracy.shape[1],
        "accuracy": accuracy.round(4).tolist(),
        "best_learning_rate": rates[best],
        "best_accuracy": float(accuracy[best].mean().round(4)),
        "best_accuracy_by_seed": accuracy[best].round(4).tolist(),
    }


class Data(NamedTuple):
    """Examples to train on, of each stage of the curriculum up to a share of the steps, and those to test on."""

    train: list[Examples]
    until: list[float]
    test: Examples


def make_data(task: Task, arguments: Arguments) -> Data:
    """Examples of the test are no training examples but by chance: the seeds differ."""
    stages = curriculum(task, arguments)
    train = [examples(1, stage.train_examples, stage) for stage, _ in stages]
    return Data(train, [until for _, until in stages], examples(2, task.test_examples, task))


def learning_rates(arguments: Arguments) -> tuple[float, ...]:
    if arguments.learning_rates is None:
        return (2e-3,) if arguments.task == "small" else PAPER_RATES
    return tuple(_numbers(arguments.learning_rates, float, "learning_rates"))


def draw(rows: list[dict], task: Task) -> Callable:
    def draw_axes(axes):
        for model in dict.fromkeys(row["model"] for row in rows):
            points = sorted((row["width"], row["best_accuracy_by_seed"]) for row in rows if row["model"] == model)
            widths, accuracies = zip(*points, strict=True)
            means = [np.mean(a) for a in accuracies]
            spread = [[m - min(a) for m, a in zip(means, accuracies, strict=True)]]
            spread.append([max(a) - m for m, a in zip(means, accuracies, strict=True)])
            axes.errorbar(widths, means, yerr=spread, marker="o", capsize=3, label=model)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["width"] for row in rows}), sorted({row["width"] for row in rows}))
        axes.set(xlabel="model width", ylabel="accuracy", ylim=(-0.03, 1.03))
        axes.set_title(f"MQAR, length {task.length}, {task.pairs} pairs")
        axes.grid(alpha=0.3)
        axes.legend()

    return draw_axes


def run(arguments: Arguments) -> None:
    task = TASKS[arguments.task]
    changes = {name: getattr(arguments, name) for name in ("steps", "batch") if getattr(arguments, name) is not None}
    task = dataclasses.replace(task, **changes)
    if min(task.steps, task.batch, arguments.seeds, arguments.evaluate_every) < 1:
        raise UserError("steps, batch, seeds and evaluate_every must be at least 1")
    models, widths = arguments.models.split(","), _numbers(arguments.widths, int, "widths")
    for model in models:
        if model not in MODELS:
            raise UserError(f'models has "{model}": choose from {", ".join(MODELS)}')
    rates = learning_rates(arguments)
    curriculum(task, arguments)
    for model in models:
        for width in widths:
            model_config(model, width, task, arguments)  # refuses what makes no model, before anything is trained
    settings = {"task": dataclasses.asdict(task), "learning_rates": rates, "seeds": arguments.seeds}
    settings |= {
        name: getattr(arguments, name)
        for name in ("dtype", "implementation", "layers", "convolution", "initial_std", "curriculum")
    }
    results = ResultsFile(arguments.results / "mqar.json", settings)
    data = None
    for width in widths:
        for model in models:
            if results.find(model=model, width=width, finished=True) is None:
                data = data or make_data(task, arguments)
                sweep(model, width, task, arguments, data, results)
            row = results.find(model=model, width=width)
            print(
                f"{model} {width}: accuracy {row['best_accuracy']:.3f} (by seed {row['best_accuracy_by_seed']}) at "
                f"learning rate {row['best_learning_rate']:g} after {row['steps']} steps, {row['seconds']:.0f} s",
                flush=True,
            )
    plot(arguments.results / "mqar.png", draw(results.rows, task))
    print(f"results: {results.path} and mqar.png beside it")


def _numbers(text: str, kind: type, name: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f'{name} is "{text}": give numbers separated by commas') from error


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(tyro.cli(Arguments, args=argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
