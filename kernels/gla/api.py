"""The one entry to gated linear attention: checks, defaults, and the choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import dispatch
from ..dispatch import Choice, check_array, checked_scale, run_with_auto_axes, vary_alike
from . import recurrence

IMPLEMENTATIONS = {  # as `kernels.dispatch` says
    "mosaic_gpu": f"{__package__}.mosaic_gpu",
    "triton": f"{__package__}.triton",
    "xla": f"{__package__}.chunked",
    "reference": f"{__package__}.recurrence",
}


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_alpha: Float[Array, "B T G K"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Eq. 3 of arXiv 2312.06635: S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    Args:
      q: queries. H is a multiple of G, and query head h reads key/value head h // (H / G).
      k, v: keys and values.
      log_alpha: natural log of the gates, <= 0. -inf is a hard reset; its gradient is 0, the derivative of exp there.
        It, q, k and v may each be bfloat16, float16 or float32.
      scale: a Python number; K^-0.5 when None.
      initial_state: float32, the state before the first token of each row; zero when None.
      segment_ids: int32. The state restarts from zero wherever the id changes along T; `initial_state` belongs to the
        first segment of a row, the final state to its last.
      return_final_state: also return S_T, float32.
      implementation: "mosaic_gpu", "triton", "xla", "reference", or None for the fastest that supports this call on
        this device; see `choose`.

    Returns:
      o in v's dtype, or (o, final state). Differentiable in every float array, states included.

    Raises:
      ValueError: a wrong shape, rank, dtype or name; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says which argument and why.
    """
    _check(q, k, v, log_alpha, initial_state, segment_ids)
    scale = checked_scale(scale, q.shape[-1])
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    module = dispatch.module_for(implementation, IMPLEMENTATIONS, q, k, v, log_alpha, **options)

    def run(q, k, v, log_alpha, initial_state, segment_ids):
        states = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
        return module.gated_linear_attention(q, k, v, log_alpha, scale=scale, **states)

    arrays = vary_alike(q, k, v, log_alpha, initial_state, segment_ids)
    outputs = ["B T H .", "B H . ."] if return_final_state else ["B T H ."]
    return run_with_auto_axes(run, arrays, ["B T H K", "B T G K", "B T G V", "B T G K", "B H K V", "B T"], outputs)


def choose(q, k, v, log_alpha, *, initial_state=None, segment_ids=None, return_final_state=False) -> Choice:
    """What `gated_linear_attention` would run for these (or such jax.ShapeDtypeStructs), and why nothing faster."""
    _check(q, k, v, log_alpha, initial_state, segment_ids)
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    return dispatch.choose(IMPLEMENTATIONS, q, k, v, log_alpha, **options)


def gated_linear_attention_step(
    q_t: Float[Array, "B H K"],
    k_t: Float[Array, "B G K"],
    v_t: Float[Array, "B G V"],
    log_alpha_t: Float[Array, "B G K"],
    state: Float[Array, "B H K V"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `gated_linear_attention`, for decoding: returns o_t in v_t's dtype and the new float32 state.

    Raises ValueError naming argument, got, and wanted for a wrong shape, rank or dtype.
    """
    sizes = {}
    check_array("q_t", q_t, "B H K", sizes)
    check_array("k_t", k_t, "B G K", sizes)
    check_array("v_t", v_t, "B G V", sizes)
    check_array("log_alpha_t", log_alpha_t, "B G K", sizes)
    _check_heads("q_t", "k_t", sizes)
    check_array("state", state, "B H K V", sizes, recurrence.state_dtype(q_t, k_t, v_t, log_alpha_t))
    return recurrence.gated_linear_attention_step(
        q_t, k_t, v_t, log_alpha_t, state, scale=checked_scale(scale, q_t.shape[-1])
    )


def _check(q, k, v, log_alpha, initial_state, segment_ids):
    """Raise ValueError for shapes and dtypes outside the contract. All of it is static, so it runs once per trace."""
    sizes = {}
    check_array("q", q, "B T H K", sizes)
    check_array("k", k, "B T G K", sizes)
    check_array("v", v, "B T G V", sizes)
    check_array("log_alpha", log_alpha, "B T G K", sizes)
    _check_heads("q", "k", sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B H K V", sizes, recurrence.state_dtype(q, k, v, log_alpha))
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", sizes, jnp.int32)


def _check_heads(q_name, k_name, sizes):
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{q_name}: got H={sizes['H']} heads, wanted a multiple of {k_name}'s G={sizes['G']}")
