"""All seeds of one model trained on a text and measured on its held-out part, as the small language experiments do."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from byte_text import ByteText
from glax.models import ModelConfig
from many_runs import ManyRuns, Training, turn


class Arguments(Protocol):
    """What an experiment's command line says of the training."""

    steps: int
    seeds: int
    learning_rate: float
    turn: Path | None
    results: Path


class Trained(NamedTuple):
    """Losses of the steps, what ``metrics`` gave of each seed, and the seconds since the start or the copy."""

    losses: Float[np.ndarray, "steps seeds"]
    held_out: Float[np.ndarray, "seeds *metrics"]
    seconds: float


def train_on_text(
    name: str,
    config: ModelConfig,
    text: ByteText,
    arguments: Arguments,
    *,
    sample: Callable,
    loss: Callable,
    looks: int,
    metrics: Callable,
    held_out: Int[Array, "batches rows length+1"],
) -> Trained:
    """Trains on ``loss`` of ``sample``'s windows, and averages ``metrics(model, windows)`` over the held-out ones.

    Args:
      name: in what is printed, and of the copy that an interrupted training continues from.
      looks: lines printed on the way.
    """
    runs = ManyRuns(
        config,
        sample,
        loss,
        Training(steps=arguments.steps, warmup_steps=arguments.steps // 10, final_fraction=0.1),
        data=jnp.asarray(text.train),
        learning_rates=(arguments.learning_rate,),
        seeds=tuple(range(arguments.seeds)),
    )
    copy = arguments.results / f"{name}.npz".replace(" ", "-").replace(":", "-")
    piece_steps = max(1, arguments.steps // looks)
    runs.compile(piece_steps)
    runs.evaluate(metrics, held_out)  # compiles that, before others have to wait
    with turn(arguments.turn):
        started = time.monotonic()
        for piece in runs.train(piece_steps, copy):
            print(
                f"{name}: step {runs.step}/{arguments.steps}, loss {piece[-1].mean():.4f}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
        measured = runs.evaluate(metrics, held_out).astype(float)
        seconds = time.monotonic() - started
    copy.unlink(missing_ok=True)
    return Trained(runs.losses.astype(float), measured, round(seconds, 1))
