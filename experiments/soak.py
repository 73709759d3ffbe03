"""Kills a small training run with SIGKILL at random moments, and looks whether anything is lost.

Every second start is killed at a random time from its beginning on, the others while they train and save; a run that
is complete gives way to a new one, until --kills kills are done. Then the last is left alone. Every run must end with
the losses of a run that nobody killed, bit for bit, each step once: a lost, repeated or reordered batch would show; and
every start must read its folder. With no arguments: 200 kills, on the CPU; exit code 0 means that nothing was lost.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import tyro

from glax.data import DataConfig, prepare
from glax.errors import UserError, exit_code
from glax.models import ModelConfig
from glax.training import OptimizerConfig, TrainConfig, train
from glax.training.metrics import read_metrics
from provenance import provenance
from results_file import make_folder


@dataclasses.dataclass(frozen=True)
class Arguments:
    kills: int = 200
    """Random kill points."""

    seed: int = 0
    """Of their times."""

    folder: Path | None = None
    """Where the runs lie; None: a temporary folder, removed at the end."""

    results: Path | None = None
    """Also write the outcome to this JSON file."""


def soak_config(folder: Path) -> TrainConfig:
    """Twelve steps of a tiny model on a few lines of text, a checkpoint after each."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    draw = random.Random(0)
    for index in range(40):
        (text / f"{index:02}.txt").write_text(" ".join(draw.choices(["red", "blue", "cat", "dog", "sees"], k=40)))
    return TrainConfig(
        ModelConfig(
            vocab_size=264,
            hidden_size=16,
            num_layers=1,
            num_heads=1,
            mlp_size=32,
            compute_dtype="float32",
            implementation="reference",
        ),
        DataConfig(train=str(text), cache=str(folder / "cache"), sequence_length=32, batch_size=2),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=12,
        evaluate_every=6,
        checkpoint_every=1,
        log_every=1,
    )


def start(
    config: TrainConfig, folder: Path, output: Path, kill_after: float | None, *, in_training: bool = False
) -> int | None:
    """One start of the run in a process of its own: its exit code, or None where the kill came first.

    ``kill_after`` seconds from its start, or ``in_training`` from when its step is compiled.
    """
    output.write_text("")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = exit_code(lambda: train(config, folder) and None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = None if kill_after is None or in_training else time.monotonic() + kill_after
    while True:
        if in_training and deadline is None and compiled(output):
            deadline = time.monotonic() + kill_after
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def compiled(output: Path) -> bool:
    return "compiled the step" in output.read_text()


def numbers(folder: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    times = {"seconds", "tokens_per_second", "data_wait"}
    return [
        {name: value for name, value in record.items() if name not in times}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder / "metrics.jsonl")), default=-1)


def soak(kills: int, seed: int, folder: Path) -> dict:
    """What came of it. Raises UserError at the first run that lost something."""
    # Compiled once for all starts.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)  # an address: a start's own
    config = soak_config(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(config.data, quiet=True)
    output = folder / "output"
    for name in ("first", "unbroken"):  # the second with what the first has compiled: its time is that of a start
        began = time.monotonic()
        if start(config, folder / name, output, None) != 0:
            raise UserError(f"the run that nobody kills failed: {output.read_text()[-500:]}")
        whole = time.monotonic() - began
    training = whole / 3  # what is killed later is complete, and does not count as a kill
    expected = numbers(folder / "unbroken")

    draw, done, run, starts, unreadable, stepped = random.Random(seed), 0, 0, 0, 0, 0
    while True:
        last = done >= kills
        path = folder / f"run{run}"
        in_training = not last and starts % 2 == 0
        kill_after = None if last else draw.uniform(0, training if in_training else whole)
        before = last_step(path)
        code = start(config, path, output, kill_after, in_training=in_training)
        starts += 1
        unreadable += "cannot be read" in output.read_text()
        if code is None:
            done += 1
            stepped += last_step(path) != before
            if done % 10 == 0:
                print(f"{done} of {kills} kills, {run} runs complete", flush=True)
            continue
        if code != 0:
            raise UserError(f"{path} could not go on after {done} kills: {output.read_text()[-800:]}")
        if numbers(path) != expected:
            raise UserError(f"{path} has other losses than the run that nobody killed, after {done} kills")
        run += 1
        if last:
            return {
                "kills": done,
                "kills_after_a_step": stepped,
                "starts": starts,
                "runs": run,
                "steps": config.steps,
                "checkpoints_set_aside": unreadable,
                "runs_with_other_losses": 0,
                "folders_that_could_not_be_read": 0,
                "seconds_of_a_start": whole,
            }


def run(argv: list[str]) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    if arguments.results is not None:
        make_folder(arguments.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = soak(arguments.kills, arguments.seed, folder)
    print(json.dumps(outcome, indent=1))
    if arguments.results is not None:
        content = {"seed": arguments.seed, "ran_on": provenance(), **outcome}
        arguments.results.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
