"""Optional places to send metrics to: TensorBoard and Weights & Biases."""

import importlib.util
import time
from pathlib import Path
from typing import Protocol

import jax

from glax.errors import UserError
from glax.training.config import TrainConfig
from glax.training.metrics import Record


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
    """Scalars in TensorBoard's event files, written without TensorFlow."""

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        # TensorBoard drops what earlier files hold of later steps when it reads a start.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=last_step + 1, session_log=start))

    def write(self, record: Record) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        event = self._event(wall_time=time.time(), step=record["step"], summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


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
