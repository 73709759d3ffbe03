"""Multi-query associative recall (paper, Figure 4): accuracy against model width, after Arora et al. 2023, "Zoology".

A row lists keys and values, k1 v1 k2 v2 ..., and then asks for each key once more, at a random place. The model must
give its value. With no arguments: a small task, on which GLA goes from nothing to all in about a minute on a CPU.
The paper's first task, on a GPU (--task l512 for the second), all models, widths and learning rates:

    --task l256 --models gla,retnet,mamba,transformer --widths 64,128,256,512

All learning rates and seeds of one model and width train in one program; a row of the JSON appears when it is done, and
the same command continues after the rows that are there. A program ends early when for every seed some learning rate
is above 0.99. "best" in a row is the learning rate with the highest mean accuracy over the seeds.

As in Zoology: 100,000 training and 3,000 test examples, AdamW with weight decay 0.1 and a cosine to 0 without warm-up,
no MLP, tied embeddings, two layers for attention and four for the others. Not as there: RMSNorm for LayerNorm, rotary
positions in attention for learned ones, gradients clipped at norm 1, batches drawn with replacement, and on a GPU
bfloat16 products; --dtype float32 has them exact.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray

from glax.errors import UserError, exit_code
from glax.models import LanguageModel, ModelConfig
from many_runs import ManyRuns, Training
from results_file import ResultsFile, plot

PAPER_RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)
MODELS = {
    "gla": {"mixer": "gla", "num_layers": 4},
    "retnet": {"mixer": "retnet", "num_layers": 4, "expand_k": 1.0, "expand_v": 2.0},
    "mamba": {"mixer": "mamba", "num_layers": 4, "expand_v": 2.0},
    "transformer": {"mixer": "attention", "num_layers": 2},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The examples, how many there are, and how long to train on them."""

    vocabulary: int
    """Symbols: 0 is nothing, the rest of the lower half are keys, the upper half are values."""

    length: int
    """Places of a row."""

    pairs: int
    """Keys, each with a value; 4 pairs must fit in the length."""

    batch: int
    """Rows of a training step."""

    steps: int
    """Training steps, at most."""

    train_examples: int = 100_000
    test_examples: int = 3_000


TASKS = {
    "small": Task(vocabulary=32, length=16, pairs=3, batch=64, steps=800, train_examples=20_000, test_examples=1_024),
    "l256": Task(vocabulary=8192, length=256, pairs=16, batch=256, steps=64 * 391),
    "l512": Task(vocabulary=8192, length=512, pairs=64, batch=128, steps=64 * 782),
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

    evaluate_every: int = 100
    """Steps between looks at the test accuracy."""

    results: Path = Path("runs/mqar")
    """Folder of mqar.json and mqar.png."""


class Examples(NamedTuple):
    """Rows with the places that ask for a key, and the values asked for. Everywhere else nothing is predicted."""

    tokens: Int[Array, "N length"]
    places: Int[Array, "N pairs"]
    answers: Int[Array, "N pairs"]


def example(key: PRNGKeyArray, task: Task) -> Examples:
    """One row: keys and values without repetition; the gaps drawn without replacement, p_i ~ 0.01 i^(0.01 - 1)."""
    half, pairs = task.vocabulary // 2, task.pairs
    for_keys, for_values, for_gaps = jax.random.split(key, 3)
    keys = 1 + jax.random.permutation(for_keys, half - 1)[:pairs]
    values = half + jax.random.permutation(for_values, half)[:pairs]
    spaces = (task.length - 2 * pairs) // 2
    weights = 0.01 * np.arange(1, spaces + 1) ** (0.01 - 1.0)
    gaps = jax.random.choice(for_gaps, spaces, (pairs,), replace=False, p=jnp.asarray(weights / weights.sum()))
    places = 2 * pairs + 2 * gaps
    context = jnp.stack([keys, values], 1).reshape(-1)
    tokens = jnp.zeros(task.length, jnp.int32).at[: 2 * pairs].set(context).at[places].set(keys)
    return Examples(tokens, places, values)


def examples(seed: int, count: int, task: Task) -> Examples:
    """``count`` rows, made on the device, a few thousand at a time."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(lambda keys: jax.lax.map(lambda key: example(key, task), keys, batch_size=2048))(keys)


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
        compute_dtype=dtype,
        implementation=arguments.implementation,
        **MODELS[model],
    )


def sweep(model: str, width: int, task: Task, arguments: Arguments, data: tuple[Examples, Examples]) -> dict:
    """Trains every learning rate and seed of one model and width: a row of the results."""
    train, test = data
    config = model_config(model, width, task, arguments)

    def sample(key, rows):
        chosen = jax.random.randint(key, (task.batch,), 0, task.train_examples)
        return jax.tree.map(lambda x: x[chosen], rows)

    rates = learning_rates(arguments)
    runs = ManyRuns(
        config,
        sample,
        lambda model, rows: loss_and_accuracy(model, rows)[0],
        Training(steps=task.steps, weight_decay=0.1, beta2=0.999),
        data=train,
        learning_rates=rates,
        seeds=tuple(range(arguments.seeds)),
    )
    size = min(256, task.test_examples)
    batches = jax.tree.map(lambda x: x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]), test)
    copy = arguments.results / f"{model}-{width}.npz"
    started, curve = time.monotonic(), []
    for losses in runs.train(arguments.evaluate_every, copy):
        _, accuracy = runs.evaluate(loss_and_accuracy, batches)
        accuracy = accuracy.reshape(len(rates), arguments.seeds)
        curve.append({"step": runs.step, "accuracy": accuracy.round(4).tolist(), "loss": losses[-1].round(4).tolist()})
        print(
            f"{model} {width}: step {runs.step}/{task.steps}, loss {losses[-1].min():.3f}, "
            f"accuracy {accuracy.max():.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if np.all(accuracy.max(0) > 0.99):
            break
    copy.unlink(missing_ok=True)
    best = int(np.argmax(accuracy.mean(1)))
    return {
        "model": model,
        "width": width,
        "parameters": config.num_parameters(),
        "layers": config.num_layers,
        "dtype": config.compute_dtype,
        "steps": runs.step,
        "learning_rates": rates,
        "seeds": arguments.seeds,
        "accuracy": accuracy.round(4).tolist(),
        "best_learning_rate": rates[best],
        "best_accuracy": float(accuracy[best].mean().round(4)),
        "best_accuracy_by_seed": accuracy[best].round(4).tolist(),
        "curve": curve,
        "seconds": round(time.monotonic() - started, 1),
    }


def learning_rates(arguments: Arguments) -> tuple[float, ...]:
    if arguments.learning_rates is None:
        return (2e-3,) if arguments.task == "small" else PAPER_RATES
    return tuple(_numbers(arguments.learning_rates, float, "learning_rates"))


def draw(rows: list[dict], task: Task) -> callable:
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
    models, widths = arguments.models.split(","), _numbers(arguments.widths, int, "widths")
    for model in models:
        if model not in MODELS:
            raise UserError(f'models has "{model}": choose from {", ".join(MODELS)}')
    rates = learning_rates(arguments)
    for model in models:
        for width in widths:
            model_config(model, width, task, arguments)  # refuses what makes no model, before anything is trained
    settings = {"task": dataclasses.asdict(task), "learning_rates": rates, "seeds": arguments.seeds}
    settings |= {"dtype": arguments.dtype, "implementation": arguments.implementation}
    results = ResultsFile(arguments.results / "mqar.json", settings)
    data = None
    for width in widths:
        for model in models:
            if results.find(model=model, width=width) is None:
                # Examples of the test are no training examples but by chance: the seeds differ.
                data = data or (examples(1, task.train_examples, task), examples(2, task.test_examples, task))
                results.add(sweep(model, width, task, arguments, data))
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
