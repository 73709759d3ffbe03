"""The one entry to retention: checks, defaults, and the choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import dispatch
from ..dispatch import Choice, check_array, checked_scale, run_with_auto_axes, vary_alike
from ..gla.recurrence import state_dtype
from . import recurrence

IMPLEMENTATIONS = {  # as `kernels.dispatch` says
    "mosaic_gpu": f"{__package__}.mosaic_gpu",
    "xla": f"{__package__}.chunked",
    "reference": f"{__package__}.recurrence",
}


def retention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_gamma: Float[Array, "B T H"] | Float[Array, "H"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = gamma_t S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t: gated linear attention with one gate for all channels.

    With a fixed decay of each head this is RetNet's retention (arXiv 2307.08621), with a decay of each token that of
    Mamba-2 (arXiv 2405.21060); with log_gamma = 0, linear attention.

    Args:
      q, k, v: queries, keys and values.
      log_gamma: natural log of the decays, <= 0, of each head and token or of each head. -inf is a hard reset; its
        gradient is 0, the derivative of exp there. It, q, k and v may each be bfloat16, float16 or float32.
      scale: a Python number; K^-0.5 when None.
      initial_state: float32, the state before the first token of each row; zero when None.
      segment_ids: int32. The state restarts from zero wherever the id changes along T; `initial_state` belongs to the
        first segment of a row, the final state to its last.
      return_final_state: also return S_T, float32.
      implementation: "mosaic_gpu", "xla", "reference", or None for the fastest that supports this call on this
        device; see `choose`.

    Returns:
      o in v's dtype, or (o, final state). Differentiable in every float array, states included.

    Raises:
      ValueError: a wrong shape, rank, dtype or name; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says which argument and why.
    """
    _check(q, k, v, log_gamma, initial_state, segment_ids)
    scale = checked_scale(scale, q.shape[-1])
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    module = dispatch.module_for(implementation, IMPLEMENTATIONS, q, k, v, log_gamma, **options)

    def run(q, k, v, log_gamma, initial_state, segment_ids):
        states = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
        return module.retention(q, k, v, jnp.broadcast_to(log_gamma, q.shape[:3]), scale=scale, **states)

    arrays = vary_alike(q, k, v, log_gamma, initial_state, segment_ids)
    decays = "H" if log_gamma.ndim == 1 else "B T H"
    outputs = ["B T H .", "B H . ."] if return_final_state else ["B T H ."]
    return run_with_auto_axes(run, arrays, ["B T H K", "B T H K", "B T H V", decays, "B H K V", "B T"], outputs)


def choose(q, k, v, log_gamma, *, initial_state=None, segment_ids=None, return_final_state=False) -> Choice:
    """What `retention` would run for these arrays (or such jax.ShapeDtypeStructs), and why nothing faster."""
    _check(q, k, v, log_gamma, initial_state, segment_ids)
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    return dispatch.choose(IMPLEMENTATIONS, q, k, v, log_gamma, **options)


def retention_step(
    q_t: Float[Array, "B H K"],
    k_t: Float[Array, "B H K"],
    v_t: Float[Array, "B H V"],
    log_gamma_t: Float[Array, "B H"] | Float[Array, "H"],
    state: Float[Array, "B H K V"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `retention`, for decoding: returns o_t in v_t's dtype and the new float32 state.

    Raises ValueError naming argument, got, and wanted for a wrong shape, rank or dtype.
    """
    sizes = {}
    check_array("q_t", q_t, "B H K", sizes)
    check_array("k_t", k_t, "B H K", sizes)
    check_array("v_t", v_t, "B H V", sizes)
    check_array("log_gamma_t", log_gamma_t, "H" if log_gamma_t.ndim == 1 else "B H", sizes)
    check_array("state", state, "B H K V", sizes, state_dtype(q_t, k_t, v_t, log_gamma_t))
    log_gamma_t = jnp.broadcast_to(log_gamma_t, q_t.shape[:2])
    return recurrence.retention_step(q_t, k_t, v_t, log_gamma_t, state, scale=checked_scale(scale, q_t.shape[-1]))


def _check(q, k, v, log_gamma, initial_state, segment_ids):
    """Raise ValueError for shapes and dtypes outside the contract. All of it is static, so it runs once per trace."""
    sizes = {}
    check_array("q", q, "B T H K", sizes)
    check_array("k", k, "B T H K", sizes)
    check_array("v", v, "B T H V", sizes)
    check_array("log_gamma", log_gamma, "H" if log_gamma.ndim == 1 else "B T H", sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B H K V", sizes, state_dtype(q, k, v, log_gamma))
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", sizes, jnp.int32)
