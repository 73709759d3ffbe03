"""metrics.jsonl, one JSON object per line: the truth about a run's curves."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from glax.training.run_folder import write_atomically, writing

Record = dict[str, Any]


class MetricsFile:
    """Appends records to a metrics.jsonl. Every record has a ``step``; they are in order of it.

    Only process 0 writes. What ``flush`` has returned from survives a kill of the process.
    """

    def __init__(self, path: Path, last_step: int):
        """Opens ``path`` with what it holds up to ``last_step``; later records, and half a line at the end, go."""
        self._path = path
        if jax.process_index() != 0:
            self._file = None
            return
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        with writing(path):
            write_atomically(path, "".join(_line(record) for record in kept))
            self._file = path.open("a")

    def write(self, record: Record) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.write(_line(record))

    def flush(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.flush()

    def sync(self) -> None:
        """``flush``, and wait for the disk: what was written survives a loss of the machine too."""
        self.flush()
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what cannot be written has been said
                self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; none where it does not exist. A line cut short by a kill ends the reading."""
    records: list[Record] = []
    if not path.exists():
        return records
    for line in path.read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _line(record: Record) -> str:
    """``record`` as a line; a number that is not finite becomes null, which JSON has."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"
