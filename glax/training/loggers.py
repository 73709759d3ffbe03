"""Optional places to send metrics to: TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import os
import socket
import time
from pathlib import Path
from typing import Protocol

import jax

from glax.errors import UserError
from glax.training.config import TrainConfig
from glax.training.metrics import Record
from glax.training.run_folder import writing


class Logger(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check_loggers(config: TrainConfig) -> None:
    """Raises UserError where a logger that ``config`` asks for is not installed."""
    for wanted, module, name in ((config.tensorboard, "tensorboard", "TensorBoard"), (config.wandb, "wandb", "wandb")):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f'{name} is not installed: run pip install "glax[loggers]"')


def open_loggers(config: TrainConfig, folder: Path, last_step: int) -> list[Logger]:
    """The loggers of process 0; what they hold of steps after ``last_step`` is superseded."""
    if jax.process_index() != 0:
        return []
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", last_step))
    if config.wandb:
        loggers.append(WeightsAndBiases(folder))
    return loggers


class TensorBoard:
    """Scalars in TensorBoard's event files, written without TensorFlow, and in this thread, which says what fails."""

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        # TensorBoard drops what earlier files hold of later steps when it reads a start.
        self._add(step=last_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, record: Record) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        self._add(step=record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be written has been said
            self._file.close()

    def _add(self, **fields) -> None:
        with writing(self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()


class WeightsAndBiases:
    """One wandb run per run folder, continued where the folder is."""

    def __init__(self, folder: Path):
        import wandb

        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project="glax", name=folder.name, dir=str(folder), id=identity.read_text(), resume="allow"
        )

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()
