"""What the person at the terminal sees of a run."""

import sys
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from glax.training.metrics import Record


def describe(record: Record) -> str:
    """A training record in one line."""
    loss = record["loss"]
    parts = [
        "loss    nan" if loss is None else f"loss {loss:6.4f}",
        f"lr {record['learning_rate']:.1e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts.append(f"data wait {100 * record['data_wait']:.1f}%")
    if record["skipped_steps"]:
        parts.append(f"{record['skipped_steps']} skipped")
    return "  ".join(parts)


class ProgressBar:
    """A live bar on a terminal, a line now and then elsewhere, nothing on processes other than the first."""

    def __init__(self, first_step: int, steps: int, quiet: bool):
        self._steps = steps
        self._silent = quiet or jax.process_index() != 0
        self._bar = None
        if not self._silent and sys.stdout.isatty():
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=Console(file=sys.stdout), transient=True)
            self._task = self._bar.add_task("", total=steps, completed=first_step, line="")

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: Record) -> None:
        """Show a training record."""
        line = f"{describe(record)}  {_clock(record['seconds'] * (self._steps - record['step']))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], line=line)
        elif not self._silent:
            print(f"step {record['step']:>6}/{self._steps}  {line}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._silent:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
