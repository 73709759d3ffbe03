"""A run is a folder: config.json, metrics.jsonl, checkpoints/, and a plot. One process at a time owns it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from glax.errors import UserError
from glax.training.config import OPERATIONAL, TrainConfig


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one rename: a reader, or a kill, finds the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses, inside, as a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room there and start the same command again, it "
            "continues from the last checkpoint"
        ) from error


def check_same_run(folder: Path, config: TrainConfig) -> None:
    """Raises UserError where ``folder`` holds a run of another config; names the fields that differ.

    A folder that does not exist, or is empty, fits any config.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: choose another run name")
    path = folder / "config.json"
    if not path.exists():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock") if folder.exists() else []
        if set(others) - {".config.json.partial"}:
            raise UserError(f"{folder} holds {others[0]} but no config.json: it is no run folder, choose another name")
        return
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): mend it or choose another run name") from error
    there = _flat(saved)
    with contextlib.suppress(UserError):  # a run of later code, whose fields are named below
        there = _flat(_as_json(read_run_config(folder))) | there
    differing = [
        f"{name} is {json.dumps(before)} there and {json.dumps(now)} here"
        for name, before, now in _differences(there, _flat(_as_json(config)))
        if name not in OPERATIONAL
    ]
    if differing:
        raise UserError(
            f"the run folder {folder} holds a run of another config: {'; '.join(differing)}. Choose another run name "
            "or restore these settings"
        )


def read_run_config(folder: Path) -> TrainConfig:
    """config.json of a run; fields that were not known when it began have their defaults.

    Raises UserError where it is none, or has fields that are not known now.
    """
    path = folder / "config.json"
    try:
        return _built(TrainConfig, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no config of a run ({error}): give a run folder") from error


@contextlib.contextmanager
def owned(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Make ``folder`` this run's, with its config.json, and keep other processes from training in it."""
    if jax.process_index() != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder} ({error.strerror}): choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process trains in {folder}: wait for it or choose another run name") from error
        except OSError:
            pass  # A file system without locks.
        with writing(folder / "config.json"):
            write_atomically(folder / "config.json", json.dumps(_as_json(config), indent=1) + "\n")
        yield


def _as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _built(kind: type, values: dict[str, Any]):
    """A dataclass from its fields as JSON has them."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints.get(name), value) for name, value in values.items()})


def _value(hint, value):
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _built(hint, value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and isinstance(value, dict):
        return _value(next(part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), value)
    return tuple(value) if isinstance(value, list) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [*now, *(name for name in before if name not in now)]
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]
