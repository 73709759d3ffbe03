"""The JSON that an experiment leaves: settings, what it ran on, and rows that appear one by one, so that it resumes."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glax.errors import UserError
from provenance import provenance

Row = dict[str, Any]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where the system refuses to write ``path``."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror}): make room or give --results another place"
        raise UserError(reason) from error


def make_folder(path: Path) -> None:
    """Make the folder of a file that results will be written to, and see that one can write there."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


class ResultsFile:
    """Rows of an experiment in ``path``, continued where a file of the same settings is there.

    Raises UserError where the file there is of other settings, and names them.
    """

    def __init__(self, path: Path, settings: dict[str, Any], **described: Any):
        self.path = path
        settings = json.loads(json.dumps(settings, default=str))  # as they read back
        self.content: dict[str, Any] = {"settings": settings, **described, "ran_on": [], "rows": []}
        if path.exists():
            self._continue(settings)
        make_folder(path)  # before hours of work
        ran_on = provenance()
        if ran_on not in self.content["ran_on"]:
            self.content["ran_on"].append(ran_on)

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def find(self, **fields: Any) -> Row | None:
        """The row that has these fields."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in fields.items())), None)

    def add(self, row: Row, replacing: Row | None = None) -> Row:
        """Append a row, or put it where another one is, and write the file, whole or not at all.

        Returns the row in the file: ``ran_on`` in it is the index in the file's list.
        """
        row = {**row, "ran_on": len(self.content["ran_on"]) - 1}
        if replacing is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(replacing)] = row
        partial = self.path.with_name(f".{self.path.name}.partial")
        with writing(self.path):
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(partial, self.path)
        return row

    def _continue(self, settings: dict[str, Any]) -> None:
        try:
            there = json.loads(self.path.read_text())
            before, _ = there["settings"], there["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no results: move it away or give --results another folder") from error
        differ = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
        if differ:
            said = "; ".join(f"{name} is {before.get(name)} there and {settings.get(name)} here" for name in differ)
            raise UserError(f"{self.path} holds results of other settings ({said}): give --results another folder")
        self.content = there


def plot(path: Path, draw: Callable, *, size: tuple[float, float] = (6.0, 4.0), columns: int = 1) -> None:
    """``draw(figure's axes)`` as a PNG at ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots(1, columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
