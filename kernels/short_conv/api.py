"""The causal depthwise convolution that linear attention layers put before their queries, keys and values."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import run_with_auto_axes


def short_convolution(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C W"],
    *,
    bias: Float[Array, "C"] | None = None,
    initial_state: Float[Array, "B W-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    return_final_state: bool = False,
) -> Float[Array, "B T C"] | tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}, j = 0..W-1: the last tap is on the current token.

    Args:
      x: bf16, f16 or f32. Sums are float32.
      weight: W taps for each channel; W is small, each is a pass over x that XLA fuses with the others.
      bias: added to every token.
      initial_state: the W-1 tokens before the first one, oldest first; zero when None.
      segment_ids: int32. Tokens before a change of the id count as zero; `initial_state` belongs to a row's first
        segment.
      lengths: int32, tokens of each row that count for the final state; all of them when None. The rest of a row is
        padding.
      return_final_state: also return the last W-1 tokens of each row, zero where they are before its last segment:
        the `initial_state` with which the row goes on. One token at a time, this is the decode step.

    Returns:
      y in x's dtype, or (y, final state), both in x's dtype. Differentiable in every float array.

    Raises:
      ValueError: a wrong shape; the message gives argument, got, and wanted.
    """
    _check(x, weight, bias, initial_state, segment_ids, lengths)
    run = functools.partial(_convolve, return_final_state=return_final_state)
    arrays = (x, weight, bias, initial_state, segment_ids, lengths)
    inputs = ["B T C", "C W", "C", "B W C", "B T", "B"]
    return run_with_auto_axes(run, arrays, inputs, ["B T C", "B . C"] if return_final_state else ["B T C"])


def _convolve(x, weight, bias, initial_state, segment_ids, lengths, *, return_final_state):
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = jnp.zeros((batch, width - 1, channels), x.dtype)
    tokens = jnp.concatenate([initial_state.astype(x.dtype), x], 1)
    segments = None if segment_ids is None else _segment_numbers(segment_ids, width - 1)

    y = 0.0
    in_float32 = tokens.astype(jnp.float32)
    for lag in range(width):
        start = width - 1 - lag
        past = in_float32[:, start : start + length]
        if segments is not None and lag > 0:
            same = segments[:, start : start + length] == segments[:, width - 1 :]
            past = jnp.where(same[..., None], past, 0)
        y = y + past * weight[:, start].astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    y = y.astype(x.dtype)
    return (y, _final_state(tokens, segments, lengths, width)) if return_final_state else y


def _segment_numbers(segment_ids, before):
    """Number of the segment of each token, from 0 in each row, with `before` tokens of the first segment in front."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, 1), ((0, 0), (before + 1, 0)))


def _final_state(tokens, segments, lengths, width):
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1] - (width - 1))
    last = lengths[:, None] + jnp.arange(width - 1)
    state = jnp.take_along_axis(tokens, last[..., None], 1)
    if segments is None:
        return state
    current = jnp.take_along_axis(segments, lengths[:, None] + width - 2, 1) if width > 1 else 0
    same = jnp.take_along_axis(segments, last, 1) == current
    return jnp.where(same[..., None], state, 0)


def _check(x, weight, bias, initial_state, segment_ids, lengths):
    if x.ndim != 3:
        raise ValueError(f"x: got shape {x.shape}, wanted [B, T, C]")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {weight.shape}, wanted [C={channels}, W] with W at least 1")
    wanted = {
        "bias": (bias, {"C": channels}),
        "initial_state": (initial_state, {"B": batch, "W-1": weight.shape[1] - 1, "C": channels}),
        "segment_ids": (segment_ids, {"B": batch, "T": length}),
        "lengths": (lengths, {"B": batch}),
    }
    for name, (array, axes) in wanted.items():
        if array is not None and array.shape != tuple(axes.values()):
            sizes = ", ".join(f"{axis}={size}" for axis, size in axes.items())
            raise ValueError(f"{name}: got shape {array.shape}, wanted [{sizes}]")
