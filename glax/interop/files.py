"""Tensors in safetensors files, one file or many with an index, read and written one tensor at a time."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from glax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 2**18
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a checkpoint's folder: names, shapes and dtypes at once, values when asked for.

    Raises UserError that names what is wrong: no files, one that is missing, cut short or no safetensors file, or a
    tensor of no known dtype.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if (folder / INDEX).exists():
            weight_map = _read_index(folder / INDEX)
            paths = sorted(set(weight_map.values()))
        elif (folder / SINGLE).exists():
            weight_map, paths = None, [SINGLE]
        else:
            raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a Hub checkpoint")
        self._files, self._where, self._offsets = {}, {}, {}
        self._paths = {name: folder / name for name in paths}
        for name, path in self._paths.items():
            self._files[name] = _opened(path, [t for t, f in (weight_map or {}).items() if f == name])
            for tensor in self._files[name].keys():  # noqa: SIM118
                self._where[tensor] = name
            self._offsets |= _offsets(path)
        for tensor, name in (weight_map or {}).items():
            if self._where.get(tensor) != name:
                raise UserError(f"{INDEX} says that {tensor} is in {name}, which does not have it: fetch it again")
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in self._where:
            view = self._view(tensor)
            self.shapes[tensor] = tuple(view.get_shape())
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{tensor} has dtype {view.get_dtype()}: only {', '.join(DTYPES)} can be read")

    def read(self, name: str, bounds: Sequence[tuple[int, int]], memory: np.ndarray) -> np.ndarray:
        """Part of a tensor, from and to which index of each axis, in its own dtype.

        It lies in ``memory``, bytes, and takes no more but for one row or ``BLOCK_BYTES``.
        """
        shape, dtype = self.shapes[name], self.dtype(name)
        sizes = [stop - start for start, stop in bounds]
        out = memory[: math.prod(sizes) * dtype.itemsize].view(dtype).reshape(sizes)
        (first, stop), *rest = bounds
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        with open(self._paths[self._where[name]], "rb", buffering=0) as file:
            file.seek(self._offsets[name] + first * row_bytes)
            if out.size * dtype.itemsize == (stop - first) * row_bytes:
                _fill(file, out, name)
                return out
            rows = max(1, BLOCK_BYTES // row_bytes)
            block = np.empty((rows, *shape[1:]), dtype)
            for start in range(0, stop - first, rows):
                here = block[: stop - first - start]
                _fill(file, here, name)
                out[start : start + rows] = here[(slice(None), *(slice(a, b) for a, b in rest))]
        return out

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self._view(name).get_dtype()]

    def _view(self, name):
        return self._files[self._where[name]].get_slice(name)


def _read_index(path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no index of safetensors files: fetch it again") from error
    return weight_map


def _opened(path, wanted):
    try:
        return safe_open(path, "np")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, with {len(wanted)} tensors, the first {min(wanted)}: fetch it") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_cut_tensor(path) or error}; fetch it again") from error


def _header(path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where a file's tensors begin, and from there the first byte of each and the one after its last."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return 8 + length, {name: tuple(item["data_offsets"]) for name, item in header.items() if name != "__metadata__"}


def _offsets(path) -> dict[str, int]:
    start, ranges = _header(path)
    return {name: start + first for name, (first, _) in ranges.items()}


def _fill(file, array: np.ndarray, name: str) -> None:
    into = memoryview(array.reshape(-1).view(np.uint8))
    while into:
        count = file.readinto(into)
        if not count:
            raise UserError(f"{file.name} was cut short while {name} was read: fetch it again")
        into = into[count:]


def _cut_tensor(path) -> str | None:
    """Which tensor a file that is too short lacks, if its header is whole."""
    try:
        start, ranges = _header(path)
        there = path.stat().st_size - start
        (_, end), name = min((ends, name) for name, ends in ranges.items() if ends[1] > there)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    return f"{name} is cut short, {end - there} bytes are missing"


def write_files(
    folder: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    value: Callable[[str], Iterable[np.ndarray]],
    max_bytes: int,
    writes: bool = True,
) -> None:
    """Write tensors in this order: one file, or several of at most ``max_bytes`` (or one tensor) and an index.

    ``value`` gives a tensor's rows, in one piece or several, when it is its turn: no two tensors are held at once,
    which the library's own writer would. Every process calls it; the one that ``writes`` does. Files get their names
    once they are complete.
    """
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes}
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in shapes:
        if groups[-1] and sum(size[n] for n, _ in groups[-1]) + size[name] > max_bytes:
            groups.append([])
        groups[-1].append((name, shape))
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for stale in (SINGLE, INDEX, *(path.name for path in folder.glob("model-*-of-*.safetensors"))):
        if writes:
            (folder / stale).unlink(missing_ok=True)
    for name, group in zip(names, groups, strict=True):
        _write_file(folder / name, group, dtype, size, value, writes)
    if count > 1 and writes:
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor, _ in group}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path, group, dtype, size, value, writes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in group:
        ends = [offset, offset + size[name]]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends}
        offset = ends[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial if writes else os.devnull, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name, shape in group:
                written = 0
                for rows in value(name):
                    written += rows.size
                    file.write(np.ascontiguousarray(rows, dtype).view(np.uint8).data)
                    del rows  # before there are the next ones
                if written != math.prod(shape):
                    raise AssertionError(f"{name} has {written} elements for the shape {shape}")
        if writes:
            os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room or choose another folder"
        ) from error
