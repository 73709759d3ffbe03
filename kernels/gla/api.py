"""The one entry to gated linear attention: checks, defaults, and the choice of implementation."""

import importlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import recurrence

# Fastest first; a module is imported when asked for. Each has `gated_linear_attention`, which takes the arguments
# below, checked and with scale a float, and brings its own derivative and sharding; and `unsupported`, which takes the
# same arguments and the platform, and gives None or a sentence that says which argument it cannot run and why.
IMPLEMENTATIONS = {
    "mosaic_gpu": "kernels.gla.mosaic_gpu",
    "xla": "kernels.gla.chunked",
    "reference": "kernels.gla.recurrence",
}

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)  # float64, under x64, makes "reference" the oracle


class Choice(NamedTuple):
    """What `gated_linear_attention` would run, and why not each faster implementation."""

    implementation: str
    passed_over: dict[str, str]


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
      implementation: "mosaic_gpu", "xla", "reference", or None for the fastest that supports this call on this
        device; see `choose`.

    Returns:
      o in v's dtype, or (o, final state). Differentiable in every float array, states included.

    Raises:
      ValueError: a wrong shape, rank, dtype or name; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says which argument and why.
    """
    _check(q, k, v, log_alpha, initial_state, segment_ids)
    scale = _checked_scale(scale, q.shape[-1])
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    if implementation is None:
        implementation = _choose(q, k, v, log_alpha, options).implementation
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, wanted None or one of {', '.join(IMPLEMENTATIONS)}")
    elif reason := _module(implementation).unsupported(q, k, v, log_alpha, **options, platform=_platform(q)):
        raise NotImplementedError(f"implementation {implementation!r} cannot run this call: {reason}")
    return _module(implementation).gated_linear_attention(q, k, v, log_alpha, scale=scale, **options)


def choose(q, k, v, log_alpha, *, initial_state=None, segment_ids=None, return_final_state=False) -> Choice:
    """What `gated_linear_attention` would run for these (or such jax.ShapeDtypeStructs), and why nothing faster."""
    _check(q, k, v, log_alpha, initial_state, segment_ids)
    options = {"initial_state": initial_state, "segment_ids": segment_ids, "return_final_state": return_final_state}
    return _choose(q, k, v, log_alpha, options)


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
    _check_array("q_t", q_t, "B H K", sizes)
    _check_array("k_t", k_t, "B G K", sizes)
    _check_array("v_t", v_t, "B G V", sizes)
    _check_array("log_alpha_t", log_alpha_t, "B G K", sizes)
    _check_heads("q_t", "k_t", sizes)
    _check_array("state", state, "B H K V", sizes, recurrence.state_dtype(q_t, k_t, v_t, log_alpha_t))
    return recurrence.gated_linear_attention_step(
        q_t, k_t, v_t, log_alpha_t, state, scale=_checked_scale(scale, q_t.shape[-1])
    )


def _module(implementation):
    return importlib.import_module(IMPLEMENTATIONS[implementation])


def _choose(q, k, v, log_alpha, options) -> Choice:
    passed_over = {}
    for name in IMPLEMENTATIONS:
        reason = _module(name).unsupported(q, k, v, log_alpha, **options, platform=_platform(q))
        if reason is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise AssertionError("the last implementation supports every call")


def _platform(x) -> str:
    """ "gpu", "cpu" or "tpu": where x lies, or where a traced computation will run by default."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices())).platform
    device = jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def _checked_scale(scale, key_width) -> float:
    if scale is None:
        return key_width**-0.5
    if isinstance(scale, jax.Array) or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, wanted None or a finite Python number (multiply q by a traced one)")
    return float(scale)


def _check(q, k, v, log_alpha, initial_state, segment_ids):
    """Raise ValueError for shapes and dtypes outside the contract. All of it is static, so it runs once per trace."""
    sizes = {}
    _check_array("q", q, "B T H K", sizes)
    _check_array("k", k, "B T G K", sizes)
    _check_array("v", v, "B T G V", sizes)
    _check_array("log_alpha", log_alpha, "B T G K", sizes)
    _check_heads("q", "k", sizes)
    if initial_state is not None:
        _check_array("initial_state", initial_state, "B H K V", sizes, recurrence.state_dtype(q, k, v, log_alpha))
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids, "B T", sizes, jnp.int32)


def _check_array(name, x, axes, sizes, dtype=None):
    """Check that x has these axes, at the sizes known so far (new ones are added), and `dtype`, or any float's."""
    wanted = "[" + ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes.split()) + "]"
    known = dict(zip(axes.split(), x.shape, strict=False)) | sizes
    if tuple(x.shape) != tuple(known.get(axis) for axis in axes.split()):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted}")
    if min(x.shape) < 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted every axis of {wanted} to be at least 1")
    sizes.update(known)
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted {jnp.dtype(dtype)}")
    if dtype is None and x.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted bfloat16, float16 or float32")


def _check_heads(q_name, k_name, sizes):
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{q_name}: got H={sizes['H']} heads, wanted a multiple of {k_name}'s G={sizes['G']}")
