"""The one entry to the selective scan: checks, defaults, and the choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import dispatch
from ..dispatch import Choice, check_array, run_with_auto_axes, vary_alike
from ..gla.recurrence import state_dtype
from . import recurrence

IMPLEMENTATIONS = {  # as `kernels.dispatch` says
    "mosaic_gpu": f"{__package__}.mosaic_gpu",
    "xla": f"{__package__}.chunked",
    "reference": f"{__package__}.recurrence",
}


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "E"],
    *,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t: Mamba (arXiv 2312.00752, Algorithm 2).

    N states for each of E channels; B and C are shared by the channels.

    Args:
      x: inputs.
      dt: step sizes, >= 0: after softplus, bias included.
      A: <= 0, finite; float32.
      B, C: what each token writes to the states and reads from them.
      D: what each channel passes by the states; float32.
      initial_state: float32, the state before the first token of each row; zero when None.
      segment_ids: int32. The state restarts from zero wherever the id changes along T; `initial_state` belongs to the
        first segment of a row, the final state to its last.
      return_final_state: also return h_T, float32.
      implementation: "mosaic_gpu", "xla", "reference", or None for the fastest that supports this call on this
        device; see `choose`.

    x, dt, B and C may each be bfloat16, float16 or float32; exponents, sums and states are float32.

    Returns:
      y in x's dtype, or (y, final state). Differentiable in every float array, states included.

    Raises:
      ValueError: a wrong shape, rank, dtype or name; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says which argument and why.
    """
    _check(x, dt, A, B, C, D, initial_state, segment_ids)
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    module = dispatch.module_for(implementation, IMPLEMENTATIONS, x, dt, A, B, C, D, **options)

    def run(x, dt, A, B, C, D, initial_state, segment_ids):
        states = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
        return module.selective_scan(x, dt, A, B, C, D, **states)

    arrays = vary_alike(x, dt, A, B, C, D, initial_state, segment_ids)
    inputs = ["B T E", "B T E", "E N", "B T N", "B T N", "E", "B E N", "B T"]
    return run_with_auto_axes(run, arrays, inputs, ["B T E", "B E ."] if return_final_state else ["B T E"])


def choose(x, dt, A, B, C, D, *, initial_state=None, segment_ids=None, return_final_state=False) -> Choice:
    """What `selective_scan` would run for these arrays (or such jax.ShapeDtypeStructs), and why nothing faster."""
    _check(x, dt, A, B, C, D, initial_state, segment_ids)
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    return dispatch.choose(IMPLEMENTATIONS, x, dt, A, B, C, D, **options)


def selective_scan_step(
    x_t: Float[Array, "B E"],
    dt_t: Float[Array, "B E"],
    A: Float[Array, "E N"],
    B_t: Float[Array, "B N"],
    C_t: Float[Array, "B N"],
    D: Float[Array, "E"],
    state: Float[Array, "B E N"],
) -> tuple[Float[Array, "B E"], Float[Array, "B E N"]]:
    """One token of `selective_scan`, for decoding: returns y_t in x_t's dtype and the new float32 state.

    Raises ValueError naming argument, got, and wanted for a wrong shape, rank or dtype.
    """
    sizes, dtype = {}, state_dtype(x_t, dt_t, A, B_t, C_t, D)
    check_array("x_t", x_t, "B E", sizes)
    check_array("dt_t", dt_t, "B E", sizes)
    check_array("A", A, "E N", sizes, dtype)
    check_array("B_t", B_t, "B N", sizes)
    check_array("C_t", C_t, "B N", sizes)
    check_array("D", D, "E", sizes, dtype)
    check_array("state", state, "B E N", sizes, dtype)
    return recurrence.selective_scan_step(x_t, dt_t, A, B_t, C_t, D, state)


def _check(x, dt, A, B, C, D, initial_state, segment_ids):
    """Raise ValueError for shapes and dtypes outside the contract. All of it is static, so it runs once per trace."""
    sizes, dtype = {}, state_dtype(x, dt, A, B, C, D)
    check_array("x", x, "B T E", sizes)
    check_array("dt", dt, "B T E", sizes)
    check_array("A", A, "E N", sizes, dtype)
    check_array("B", B, "B T N", sizes)
    check_array("C", C, "B T N", sizes)
    check_array("D", D, "E", sizes, dtype)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B E N", sizes, dtype)
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", sizes, jnp.int32)
