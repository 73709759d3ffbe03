"""Token mixing over a mesh, shard by shard: of batch, heads and channels, and of the sequence where it is cut."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax.core import spmd
from jax.sharding import AbstractMesh, PartitionSpec
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

    heads, groups, states = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None), ("batch", "heads", None, None)
    decay = {4: groups, 3: (*TOKENS, "heads"), 1: ("heads",)}[log_decay.ndim]
    inputs, outputs = (heads, groups, groups, decay, states, TOKENS), heads if state is None else (heads, states)
    o = _by_shard(shard, (q, k, v, log_decay, state, segment_ids), inputs, outputs)
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

    channels, written, states = (*TOKENS, "mlp"), (*TOKENS, None), ("batch", "mlp", None)
    inputs = (channels, channels, ("mlp", None), written, written, ("mlp",), states, TOKENS)
    outputs = channels if state is None else (channels, states)
    y = _by_shard(shard, (x, dt, A, B, C, D, state, segment_ids), inputs, outputs)
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

        channels = (*TOKENS, axis)
        inputs = (channels, (axis, None), (axis,), TOKENS)
        return _by_shard(shard, (x, weight, bias, segment_ids), inputs, channels), None
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
    return _by_shard(shard, (q, k, v, segments), (heads, groups, groups, TOKENS), heads)


def _by_shard(run: Callable, arrays: Sequence, inputs: Sequence[tuple], outputs: tuple) -> Any:
    """``run(*arrays)``, on a mesh of several devices on each one's share; ``inputs`` and ``outputs``: logical axes.

    Inside ``shard_map`` a block's kernels are lowered with the block, once for all blocks. A plain call under a mesh is
    partitioned by the compiler, which lowers the kernels of every layer again; it stays where the mesh does not divide
    an array, such as a batch of one row, which has no equal shares. None among the arrays stays None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not spmd.get_logical_axis_rules():
        return run(*arrays)

    def specs(axes):
        several = any(isinstance(names, tuple) for names in axes)
        return tuple(map(specs, axes)) if several else spmd.apply_rules(axes, None)

    in_specs = specs(inputs)
    if sequence_axis() is None and not all(map(functools.partial(_divides, mesh), arrays, in_specs)):
        return run(*arrays)
    # Pallas' GPU kernels do not trace where shard_map checks what varies.
    return jax.shard_map(run, in_specs=in_specs, out_specs=specs(outputs), check_vma=False)(*arrays)


def _divides(mesh: AbstractMesh, x: Array | None, spec: PartitionSpec) -> bool:
    ways = [math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over or ())) for over in spec]
    return x is None or all(size % n == 0 for size, n in zip(x.shape, ways, strict=True))
