"""Metrics of steps on their way from the devices to metrics.jsonl, the loggers and the screen."""

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from glax.errors import UserError
from glax.training.config import TrainConfig
from glax.training.loggers import Logger
from glax.training.metrics import MetricsFile, Record
from glax.training.progress import ProgressBar
from glax.training.step import Batch, Metrics
from glax.training.utilization import peak_flops

# Steps that the host may be ahead of the devices: enough to hide its own work.
STEPS_AHEAD = 2


class Journal:
    """Takes the metrics of each step and passes them on.

    Reading a step's metrics waits for it, so they are read ``STEPS_AHEAD`` steps late.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, metrics: MetricsFile, loggers: list[Logger], bar: ProgressBar):
        self.bar = bar
        self._config = config
        self._metrics = metrics
        self._loggers = loggers
        self._pending: deque[tuple[int, Metrics]] = deque()
        self._window: list[Record] = []
        self._tokens = config.data.batch_size * config.data.sequence_length
        peak = peak_flops(list(mesh.devices.flat))
        self._flops = config.model.flops_per_token(config.data.sequence_length) / peak if peak else None

    def start_clock(self) -> None:
        self._since, self._waited = time.monotonic(), 0.0

    def wait_for(self, fetch: Callable[[], Batch]) -> Batch:
        """What ``fetch`` gives; the time it takes counts as waiting for data."""
        started = time.monotonic()
        batch = fetch()
        self._waited += time.monotonic() - started
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is no training time."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def step(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))
        while len(self._pending) > STEPS_AHEAD:
            self._read()
        if len(self._window) >= self._config.log_every:
            self._write()

    def drain(self) -> None:
        """Wait for all steps so far and write what is known of them, to the disk."""
        while self._pending:
            self._read()
        self._write()
        self._metrics.sync()

    def validation(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, **values}
        self._send(record)
        self._metrics.flush()
        self.bar.say(
            f"step {step}: validation loss {values['validation_loss']:.4f}, perplexity "
            f"{values['validation_perplexity']:.2f}, {values['validation_bits_per_byte']:.4f} bits per byte"
        )

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self._window.append({
            "step": step,
            "loss": values["loss"],
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "skipped_steps": values["skipped"],
        })  # fmt: skip
        if values["skipped_in_row"] >= self._config.max_skipped_steps:
            self._write()
            raise UserError(
                f"{values['skipped_in_row']} steps in a row, up to step {step}, had a loss or gradient that is not "
                "finite and were skipped: lower optimizer.learning_rate or look for damaged data"
            )

    def _write(self) -> None:
        """Give the steps of the window their share of its time, and send them on."""
        if not self._window:
            return
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        seconds = elapsed / len(self._window)
        speed = self._tokens / seconds
        for record in self._window:
            record |= {"seconds": seconds, "tokens_per_second": speed, "data_wait": min(self._waited / elapsed, 1.0)}
            if self._flops is not None:
                record["mfu"] = speed * self._flops
            self._send(record)
        self._metrics.flush()
        last = dict(self._window[-1])
        last["loss"] = math.fsum(record["loss"] for record in self._window) / len(self._window)
        self.bar.update(last)
        self._window = []
        self._since, self._waited = now, 0.0

    def _send(self, record: Record) -> None:
        for sink in itertools.chain([self._metrics], self._loggers):
            sink.write(record)
