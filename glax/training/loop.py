"""A run from its first step, or from where it was left, to its last."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from glax.data import (
    PreparedData,
    Tokenizer,
    TrainBatches,
    check_vocabulary,
    load_tokenizer,
    prepare,
    train_batches,
    validation_batches,
)
from glax.errors import Stopped, UserError
from glax.models import LanguageModel
from glax.training.checkpoints import Checkpoints
from glax.training.config import MeshConfig, TrainConfig
from glax.training.journal import Journal
from glax.training.loggers import check_loggers, open_loggers
from glax.training.mesh_choice import MICROBATCH_TOKENS, choose_mesh
from glax.training.metrics import MetricsFile, Record, read_metrics
from glax.training.optimizer import check_optimizer
from glax.training.plot import plot_losses
from glax.training.processes import StopSignal, or_lost
from glax.training.profiling import Trace
from glax.training.progress import ProgressBar
from glax.training.run_folder import check_same_run, owned, writing
from glax.training.sharding import AXES, batch_sharding, check_divisible, make_mesh, place_batch, row_part, use_mesh
from glax.training.state import Plan, TrainState, plan_state
from glax.training.step import make_loss, make_train_step
from glax.training.validation import validate


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        model: with the parameters after the last step.
        tokenizer: of its text.
        records: all of metrics.jsonl.
        already_complete: the run was complete before this start, which trained nothing.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    records: list[Record]
    already_complete: bool

    @property
    def validations(self) -> list[Record]:
        """The records of validation passes, first to last; nan where metrics.jsonl has null."""
        passes = [record for record in self.records if "validation_loss" in record]
        return [{name: math.nan if value is None else value for name, value in record.items()} for record in passes]

    @property
    def data_wait(self) -> float:
        """Share of all training time that was spent waiting for data."""
        steps = [record for record in self.records if "seconds" in record]
        return sum(r["data_wait"] * r["seconds"] for r in steps) / max(sum(r["seconds"] for r in steps), 1e-9)


def train(
    config: TrainConfig, folder: Path, *, devices: Sequence[jax.Device] | None = None, quiet: bool = False
) -> TrainResult:
    """Train as ``config`` says, in the run folder ``folder``; continue there if a run of the same config was left.

    On CPU a continued run has bit for bit the losses of an unbroken one. ``devices`` are all, unless given. Raises
    UserError for bad input, before anything is written; for a run of another config in ``folder``; where
    ``max_skipped_steps`` steps in a row were not finite; and where another process is lost. Raises Stopped after a
    SIGTERM to any process, once all is saved.
    """
    config = with_chosen_mesh(config, jax.devices() if devices is None else devices, quiet)
    mesh = make_mesh(config.mesh, devices)
    microbatches = choose_microbatches(config, mesh)
    check_divisible(mesh, config.model, config.data, microbatches)
    _check_positive(config)
    check_optimizer(config.optimizer)
    check_loggers(config)
    check_same_run(folder, config)
    check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
    with use_mesh(mesh):
        plan, step = plan_and_trace(config, mesh, microbatches)
        data = prepare(config.data, quiet=quiet or jax.process_index() != 0)
        part, parts = row_part(mesh)
        batches = train_batches(data, config.data, process_index=part, process_count=parts)
        with contextlib.closing(batches), owned(folder, config):
            run = Run(config, folder, mesh, plan, step, microbatches, data, quiet)
            return or_lost(run.go, batches)


def with_chosen_mesh(config: TrainConfig, devices: Sequence[jax.Device], quiet: bool) -> TrainConfig:
    """``config`` with the mesh that ``mesh.auto`` asks for, and a line that says why; ``config`` itself without."""
    if not config.mesh.auto:
        return config
    if config.mesh != MeshConfig(auto=True):
        raise UserError("mesh.auto chooses every axis: leave mesh.data, fsdp, tensor and sequence out, or auto")
    local = next(device for device in devices if device.process_index == jax.process_index())
    memory = (local.memory_stats() or {}).get("bytes_limit", math.inf)
    mesh, why = choose_mesh(config, len(devices), memory, host=8)
    if not quiet and jax.process_index() == 0:
        axes = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "one device"
        print(f"mesh: {axes} ({why})", flush=True)
    return dataclasses.replace(config, mesh=mesh)


def plan_and_trace(config: TrainConfig, mesh: Mesh, microbatches: int) -> tuple[Plan, Lowered]:
    """The plan of the state and the traced step. What models and kernels refuse, they refuse here, as a UserError."""
    shape = (config.data.batch_size, config.data.sequence_length)
    dtypes = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}
    sharding = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
    try:
        plan = plan_state(config, mesh)
        return plan, make_train_step(plan, config, microbatches).lower(plan.abstract, batch)
    except UserError:
        raise
    except (NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split("\n-----", 1)[0].split())
        raise UserError(f"this model cannot be trained here: {reason}") from error


def choose_microbatches(config: TrainConfig, mesh: Mesh) -> int:
    """``config.microbatches``, or the fewest that divide a device's rows into ``MICROBATCH_TOKENS`` or less each."""
    if config.microbatches is not None:
        return config.microbatches
    rows = max(1, config.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]))
    length = -(-config.data.sequence_length // mesh.shape["sequence"])
    fits = (n for n in range(1, rows) if rows % n == 0 and rows // n * length <= MICROBATCH_TOKENS)
    return next(fits, rows)


def _check_positive(config: TrainConfig) -> None:
    for name in ("steps", "evaluate_every", "checkpoint_every", "keep_checkpoints", "max_skipped_steps", "log_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: it must be at least 1")
    if config.keep_every is not None and config.keep_every < 1:
        raise UserError(f"keep_every is {config.keep_every}: give a number of steps, or leave it out")


class Run:
    """One start of a run: the pieces that ``train`` has put together, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        mesh: Mesh,
        plan: Plan,
        step: Lowered,
        microbatches: int,
        data: PreparedData,
        quiet: bool,
    ):
        self.config = config
        self.folder = folder
        self.mesh = mesh
        self.plan = plan
        self.step = step
        self.tokenizer = data.tokenizer
        part, parts = row_part(mesh)
        self.validation = validation_batches(data, config.data, process_index=part, process_count=parts)
        self.loss = make_loss(plan, microbatches)
        self.quiet = quiet

    def go(self, batches: TrainBatches) -> TrainResult:
        config = self.config
        with Checkpoints(self.folder / "checkpoints", config.keep_checkpoints, config.keep_every) as checkpoints:
            state = checkpoints.restore(self.plan.abstract, batches)
            first = 0 if state is None else int(state.step)
            already_complete = first >= config.steps
            metrics = MetricsFile(self.folder / "metrics.jsonl", last_step=first if state is not None else -1)
            with contextlib.ExitStack() as stack:
                stack.callback(metrics.close)
                if not already_complete:
                    loggers = open_loggers(config, self.folder, first)
                    for logger in loggers:
                        stack.callback(logger.close)
                    stopping = stack.enter_context(StopSignal())
                    bar = stack.enter_context(ProgressBar(first, config.steps, self.quiet))
                    journal = Journal(config, self.mesh, metrics, loggers, bar)
                    state = self._train(state, batches, checkpoints, journal, stopping)
        records = read_metrics(self.folder / "metrics.jsonl")
        if jax.process_index() == 0 and not any("validation_loss" in record for record in records):
            raise UserError(
                f"{self.folder / 'metrics.jsonl'} has lost its validation passes, and with them the curves; the run is "
                "complete and its checkpoints can be used"
            )
        plot = self.folder / "loss.png"
        if jax.process_index() == 0 and not (already_complete and plot.exists()):
            with writing(plot):
                plot_losses(records, plot, self.folder.name)
        return TrainResult(self.plan.build(state.params), self.tokenizer, records, already_complete)

    def _train(
        self,
        state: TrainState | None,
        batches: TrainBatches,
        checkpoints: Checkpoints,
        journal: Journal,
        stopping: StopSignal,
    ) -> TrainState:
        """Steps from ``state`` (None: from the start) to the last, with validation and checkpoints as configured.

        At a step's end come its metrics, then validation, then the checkpoint: a checkpoint at step s therefore stands
        for metrics.jsonl up to s, complete.
        """
        config = self.config
        first = 0 if state is None else int(state.step)
        started = time.monotonic()
        compiled = self.step.compile()
        where = "" if state is None else f"continuing after step {first}; "
        journal.bar.say(f"{where}compiled the step in {time.monotonic() - started:.1f} s")
        if state is None:
            state = self.plan.initialize()
            journal.validation(0, self._validate(state))
        trace = Trace(self.folder / "profile" if config.profile else None, first, config.steps)
        journal.start_clock()
        for step in range(first + 1, config.steps + 1):
            trace.before(step)
            batch = journal.wait_for(lambda: next(batches))
            state, metrics = compiled(state, place_batch(batch, self.mesh))
            journal.step(step, metrics)
            if trace.after(step, state):
                journal.bar.say(f"wrote a profile of a few steps to {trace.folder}")
            if step % config.evaluate_every == 0 or step == config.steps:
                journal.drain()
                with journal.paused():
                    journal.validation(step, self._validate(state))
            stop = stopping.reached(step) and step < config.steps
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                journal.drain()
                checkpoints.save(step, state, batches)
            if stop:
                checkpoints.wait()
                raise Stopped(f"stopped by SIGTERM after step {step}, saved: the same command continues there")
        checkpoints.wait()
        return state

    def _validate(self, state: TrainState) -> dict[str, float]:
        return validate(self.loss, state.params, self.validation, self.mesh)
