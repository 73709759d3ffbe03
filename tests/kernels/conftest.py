"""Every transfer into shared memory that any test traces goes to whole lines of it."""

import math

import jax.experimental.pallas.fuser  # noqa: F401 (imported on the way, it would make all that was traced before anew)
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

LINE = 128  # bytes


@pytest.fixture(scope="session", autouse=True)
def transfers_start_at_lines():
    """A GPU refuses a TMA transfer to an address between lines ("misaligned address"); the interpreter takes it."""
    copy = plgpu.copy_gmem_to_smem

    def checked(source, target, barrier, **options):
        whole = getattr(target, "ref", target)  # the allocation: tiles one after the other
        tile_bytes = math.prod(whole.shape[1:]) * whole.dtype.itemsize
        assert whole.shape[0] == 1 or len(whole.shape) == 1 or tile_bytes % LINE == 0, (
            f"tiles of {tile_bytes} bytes: all but the first start between lines of {LINE}"
        )
        return copy(source, target, barrier, **options)

    plgpu.copy_gmem_to_smem = checked
    yield
    plgpu.copy_gmem_to_smem = copy
