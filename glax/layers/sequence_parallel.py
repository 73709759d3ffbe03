"""Token mixing where the sequence may be shared out over devices: plain calls where it is not, else shard by shard."""

import functools
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
    state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    implementation: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"] | None]:
    """o of ``operator``, such as ``kernels.gated_linear_attention``, and the new state where ``state`` is given."""
    axis, options = sequence_axis(), {"return_final_state": state is not None, "implementation": implementation}

    def shard(q, k, v, log_decay, state, segment_ids):
        run = operator if axis is None else functools.partial(linear_attention_over, axis, operator)
        return run(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids, **options)

    if axis is not None:
        heads, groups, states = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None), ("batch", "heads", None, None)
        decay = {4: groups, 3: (*TOKENS, "heads"), 1: ("heads",)}[log_decay.ndim]
        outputs = heads if state is None else (heads, states)
        shard = _by_shard(shard, (heads, groups, groups, decay, states, TOKENS), outputs)
    o = shard(q, k, v, log_decay, state, segment_ids)
    return (o, None) if state is None else o


@jax.named_scope("operator")
def state_space(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "E"],
    *,
    state: Float[Array, "B E N"] | None,
    segment_ids: Int[Array, "B T"] | None,
    implementation: str | None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"] | None]:
    """y of ``kernels.selective_scan``, with channels along the logical axis "mlp", and the new state as above."""
    axis, options = sequence_axis(), {"return_final_state": state is not None, "implementation": implementation}

    def shard(x, dt, A, B, C, D, state, segment_ids):
        run = selective_scan if axis is None else functools.partial(selective_scan_over, axis)
        return run(x, dt, A, B, C, D, initial_state=state, segment_ids=segment_ids, **options)

    if axis is not None:
        channels, written, states = (*TOKENS, "mlp"), (*TOKENS, None), ("batch", "mlp", None)
        inputs = (channels, channels, ("mlp", None), written, written, ("mlp",), states, TOKENS)
        shard = _by_shard(shard, inputs, channels if state is None else (channels, states))
    y = shard(x, dt, A, B, C, D, state, segment_ids)
    return (y, None) if state is None else y


def convolution(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C W"],
    *,
    axis: str | None,
    bias: Float[Array, "C"] | None,
    state: Float[Array, "B past C"] | None,
    segment_ids: Int[Array, "B T"] | None,
    lengths: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"] | None]:
    """y of ``kernels.short_convolution``, its channels along the logical ``axis``, and the new state as above.

    A state, and lengths, keep the sequence whole.
    """
    sequence = sequence_axis()
    if sequence is not None and state is None and lengths is None:

        def shard(x, weight, bias, segment_ids):
            return short_convolution_over(sequence, x, weight, bias=bias, segment_ids=segment_ids)

        run = _by_shard(shard, ((*TOKENS, axis), (axis, None), (axis,), TOKENS), (*TOKENS, axis))
        return run(x, weight, bias, segment_ids), None
    options = {"segment_ids": segment_ids, "lengths": lengths, "return_final_state": state is not None}
    y = short_convolution(x, weight, bias=bias, initial_state=state, **options)
    return (y, None) if state is None else y


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
