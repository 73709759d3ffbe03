"""Asynchronous checkpoints of the state and the place in the data, and the way back to the newest readable one."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax
from orbax.checkpoint import v1 as ocp

from glax.data import TrainBatches
from glax.errors import UserError
from glax.training.state import TrainState


class Checkpoints:
    """The ``checkpoints/`` folder of a run: one folder per step, of which the newest ``keep`` and the multiples of
    ``keep_every`` stay.

    A checkpoint gets its name in one rename after all its files are written, so a process killed while it saves leaves
    no half checkpoint under a step's name.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs, in every thread, errors that it raises too
        self._folder = folder
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every is not None else [])
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._saving = None  # what orbax gives for a save; its thread and its files stay open until asked for a result

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            with self._refusals():
                self._checkpointer.close()

    def save(self, step: int, state: TrainState, batches: TrainBatches) -> None:
        """Copy ``state`` and the place of ``batches``, and write them while training goes on.

        Waits for the save before, if it is not done. Raises UserError where the disk refuses.
        """
        self.wait()
        with self._refusals():
            saving = {"state": _tree(state), "data": batches}
            self._saving = self._checkpointer.save_checkpointables_async(step, saving)

    def wait(self) -> None:
        """Until the last save is on disk. Raises UserError where the disk refuses."""
        saving, self._saving = self._saving, None
        with self._refusals():
            if saving is not None:
                saving.result()

    def restore(self, abstract: TrainState, batches: TrainBatches) -> TrainState | None:
        """The newest checkpoint that can be read, with ``batches`` set to its place; None where there is none.

        Newer ones that cannot be read are moved to ``unreadable/`` in the run folder, with a line that says so. Where
        none can be read all stay, for the fault may not be theirs, and nobody wants a long run to begin again unasked:
        a UserError, as for the place of other data.
        """
        unreadable: dict[int, str] = {}
        for checkpoint in reversed(self._checkpointer.checkpoints):
            step = checkpoint.step
            try:
                loaded = self._checkpointer.load_checkpointables(step, {"state": _tree(abstract), "data": batches})
            except UserError:
                raise
            except Exception as error:  # orbax raises many kinds for a damaged file
                user_error = _user_error(error)
                if user_error is not None:
                    raise user_error from error
                unreadable[step] = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            else:
                self._set_aside(unreadable, step)
                return TrainState(**loaded["state"])
        if unreadable:
            step, reason = next(iter(unreadable.items()))
            raise UserError(
                f"no checkpoint in {self._folder} can be read (of step {step}: {reason}): mend that and start the same "
                "command again, or choose another run name to start from the first step"
            )
        return None

    def _set_aside(self, reasons: dict[int, str], taken: int) -> None:
        if not reasons:
            return
        if jax.process_index() == 0:
            folder = self._folder.parent / "unreadable"
            folder.mkdir(exist_ok=True)
            for step, reason in reasons.items():
                shutil.rmtree(folder / str(step), ignore_errors=True)
                (self._folder / str(step)).rename(folder / str(step))
                print(f"checkpoint {step} cannot be read ({reason}): moved to {folder}, going on from {taken}")
        self._checkpointer.reload()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """A write that the system refuses, inside, as a UserError that says what to do."""
        try:
            yield
        except Exception as error:
            reason = _refusal(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write a checkpoint to {self._folder} ({reason}): make room there and start the same command "
                "again, it continues from the last checkpoint"
            ) from error


def _refusal(error: Exception) -> str | None:
    """What the system said when it refused a write, if ``error`` comes of that.

    orbax writes the small files, and fails with an OSError; tensorstore writes the arrays, and fails with a ValueError
    that has the system's error number in its text alone.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None


def _tree(state: TrainState) -> dict:
    """``state`` as plain containers, so that a checkpoint's layout does not depend on this class."""
    return {name: getattr(state, name) for name in TrainState.__dataclass_fields__}


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that ``error`` was raised from, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
