"""A jax profiler trace of a few steps."""

from pathlib import Path

import jax

from glax.training.state import TrainState

WARM_STEPS = 3
TRACED_STEPS = 5


class Trace:
    """Traces ``TRACED_STEPS`` steps to ``folder``, after ``WARM_STEPS`` have passed; nothing where folder is None.

    ``first`` is the step before this start's first one, ``last`` its last.
    """

    def __init__(self, folder: Path | None, first: int, last: int):
        self.folder = folder
        self._begin = min(first + WARM_STEPS + 1, last)
        self._end = min(self._begin + TRACED_STEPS - 1, last)

    def before(self, step: int) -> None:
        if self.folder is not None and step == self._begin:
            jax.profiler.start_trace(self.folder)

    def after(self, step: int, state: TrainState) -> bool:
        """Whether the trace has just been written."""
        if self.folder is None or step != self._end:
            return False
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        return True
