"""Token mixing where the sequence may be shared out over devices: plain calls where it is not, else shard by shard."""

from collections.abc import Callable, Sequence

import jax
from flax.core import spmd
from jaxtyping import Array, Float, Int

from kernels import selective_scan, short_convolution
from kernels.sequence_parallel import (
    linear_attention_over,
    selective_scan_over,
    short_convolution_over,
    softmax_attention_over,
)

TOKENS = ("batch", "length")


def sequence_axis() -> str | None:
    """The mesh axis that the logical axis "length" lies along, where that axis has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = dict(spmd.get_logical_axis_rules()).get("length")
    return axis if axis is not None and not mesh.empty and mesh.shape[axis] > 1 else None


@jax.named_scope("operator")
def linear_attention(
    operator: Callable,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "..."],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    **options,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """``operator``, such as ``kernels.gated_linear_attention``, with its arguments."""
    options["return_final_state"] = return_final_state
    axis = sequence_axis()
    if axis is None:
        return operator(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids, **options)

    def shard(q, k, v, log_decay, initial_state, segment_ids):
        states = {"initial_state": initial_state, "segment_ids": segment_ids}
        return linear_attention_over(axis, operator, q, k, v, log_decay, **states, **options)

    heads, groups, state = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None), ("batch", "heads", None, None)
    decay = {4: groups, 3: (*TOKENS, "heads"), 1: ("heads",)}[log_decay.ndim]
    outputs = (heads, state) if return_final_state else heads
    run = _by_shard(shard, (heads, groups, groups, decay, state, TOKENS), outputs)
    return run(q, k, v, log_decay, initial_state, segment_ids)


@jax.named_scope("operator")
def state_space(
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
    **options,
) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """``kernels.selective_scan``, its channels along the logical axis "mlp"."""
    options["return_final_state"] = return_final_state
    axis = sequence_axis()
    if axis is None:
        states = {"initial_state": initial_state, "segment_ids": segment_ids}
        return selective_scan(x, dt, A, B, C, D, **states, **options)

    def shard(x, dt, A, B, C, D, initial_state, segment_ids):
        states = {"initial_state": initial_state, "segment_ids": segment_ids}
        return selective_scan_over(axis, x, dt, A, B, C, D, **states, **options)

    channels, written, state = (*TOKENS, "mlp"), (*TOKENS, None), ("batch", "mlp", None)
    inputs = (channels, channels, ("mlp", None), written, written, ("mlp",), state, TOKENS)
    run = _by_shard(shard, inputs, (channels, state) if return_final_state else channels)
    return run(x, dt, A, B, C, D, initial_state, segment_ids)


def convolution(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C W"],
    *,
    axis: str | None,
    bias: Float[Array, "C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options,
) -> Float[Array, "B T C"]:
    """``kernels.short_convolution``, its channels along the logical ``axis``; a state keeps the sequence whole."""
    sequence = sequence_axis()
    if sequence is None or any(value is not None and value is not False for value in options.values()):
        return short_convolution(x, weight, bias=bias, segment_ids=segment_ids, **options)

    def shard(x, weight, bias, segment_ids):
        return short_convolution_over(sequence, x, weight, bias=bias, segment_ids=segment_ids)

    run = _by_shard(shard, ((*TOKENS, axis), (axis, None), (axis,), TOKENS), (*TOKENS, axis))
    return run(x, weight, bias, segment_ids)


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None,
    window: int | None,
) -> Float[Array, "B T H V"]:
    """``kernels.sequence_parallel.softmax_attention_over``; call it where ``sequence_axis()`` is not None."""

    axis = sequence_axis()

    def shard(q, k, v, segments):
        return softmax_attention_over(axis, q, k, v, segments=segments, window=window)

    heads, groups = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None)
    return _by_shard(shard, (heads, groups, groups, TOKENS), heads)(q, k, v, segments)


def _by_shard(run: Callable, inputs: Sequence[tuple], outputs: tuple) -> Callable:
    """``run`` on each device's share of arrays with these logical axes (None among the arguments has any)."""

    def specs(axes):
        several = any(isinstance(names, tuple) for names in axes)
        return tuple(map(specs, axes)) if several else spmd.apply_rules(axes, None)

    # Pallas' GPU kernels do not trace where shard_map checks what varies.
    return jax.shard_map(run, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
