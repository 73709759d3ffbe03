"""Wide heads behind a custom derivative, on each device's share of the batch and the heads."""

import functools
import math

import jax
from jax.sharding import AxisType

from ...once import wait_for_kernels
from ..partition import shard_over_batch_and_heads
from .tiles import wide_pieces, wide_tiles
from .wide import backward, forward

INPUTS = {"q": "B T H K", "k": "B T G K", "v": "B T G V", "log_alpha": "B T G K"}
STATE = "B H K V"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(scale, return_final_state, interpret, q, k, v, log_alpha, initial_state, documents):
    """o and the final state (or None). Arguments as those of `wide.forward`; groups of any size, documents or None."""
    inputs = q, k, v, log_alpha, initial_state, documents
    o, final_state, _ = _attend(scale, return_final_state, interpret, False, *inputs)
    return o, final_state


def _attend(scale, return_final_state, interpret, in_training, q, k, v, log_alpha, initial_state, documents):
    """`wide.forward` per shard. How many pieces a sequence has is the same on all, since states between them are saved:
    by the mesh in use, as if all its devices shared rows and heads."""
    pieces = wide_pieces(q.shape, v.shape, _shards())

    def run(q, k, v, log_alpha, **optional):
        tiles = wide_tiles(q.shape, pieces)
        found = forward(
            q, k, v, log_alpha, scale=scale, tiles=tiles, return_final_state=return_final_state, interpret=interpret,
            **optional,
        )  # fmt: skip
        if interpret is None and not in_training:
            found = wait_for_kernels(found[0]), *found[1:]
        return tuple(x for x in found if x is not None)

    cut = pieces > 1
    outputs = ["B T H V", *([STATE] if return_final_state else []), *(["B H N V K"] if cut else [])]
    arrays = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "initial_state": initial_state, "documents": documents}
    axes = INPUTS | {"initial_state": STATE, "documents": "B T"}
    o, *found = _sharded(run, arrays, axes, outputs, interpret)
    return o, found.pop(0) if return_final_state else None, found.pop(0) if cut else None


def _attend_forward(scale, return_final_state, interpret, *inputs):
    o, final_state, entering = _attend(scale, return_final_state, interpret, True, *inputs)
    return (o, final_state), (inputs, entering, final_state)


def _attend_backward(scale, return_final_state, interpret, residuals, cotangents):
    (q, k, v, log_alpha, initial_state, documents), entering, final_state = residuals
    do, final_gradient = cotangents
    arrays = {
        "q": q, "k": k, "v": v, "log_alpha": log_alpha, "do": do, "initial_state": initial_state,
        "entering": entering, "final_state": final_state, "final_gradient": final_gradient, "documents": documents,
    }  # fmt: skip
    axes = INPUTS | {"do": "B T H V", "entering": "B H N V K", "documents": "B T"}
    axes |= dict.fromkeys(("initial_state", "final_state", "final_gradient"), STATE)
    outputs = ["B T H K", "B T G K", "B T G V", "B T G K", *([] if initial_state is None else [STATE])]
    run = functools.partial(_gradients, scale, interpret)
    dq, dk, dv, dg, *d_initial = _sharded(run, arrays, axes, outputs, interpret)
    return dq, dk, dv, dg, d_initial[0] if d_initial else None, None


def _gradients(scale, interpret, q, k, v, log_alpha, do, **optional):
    """Of q, k, v, log_alpha, and of the initial state if there is one, of a device's share."""
    entering = optional.get("entering")
    tiles, G = wide_tiles(q.shape, 1 if entering is None else entering.shape[2]), k.shape[2]
    dq, dk, dg, dv, d_initial = backward(
        q, k, v, log_alpha, do, scale=scale, tiles=tiles, interpret=interpret, **optional
    )
    if interpret is None:
        dq = wait_for_kernels(dq)
    d_state = () if d_initial is None else (d_initial,)
    return dq, _of_groups(dk, G), _of_groups(dv, G), _of_groups(dg, G), *d_state


attend.defvjp(_attend_forward, _attend_backward)


def _shards() -> int:
    """Devices of the mesh in use over which arrays may be shared out by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(
        size for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind != AxisType.Manual
    )


def _sharded(run, arrays, axes, outputs, interpret):
    """`run` on each device's share of the arrays that are not None; the interpreter cannot be partitioned."""
    arrays = {name: x for name, x in arrays.items() if x is not None}
    call = lambda *given: run(**dict(zip(arrays, given, strict=True)))
    if interpret is None:
        call = shard_over_batch_and_heads(call, [axes[name] for name in arrays], outputs)
    return call(*arrays.values())


def _of_groups(x, groups):
    """Gradients of query heads, [B, T, H, .], to those of what G groups of them read."""
    B, T, H, width = x.shape
    return x if groups == H else x.reshape(B, T, groups, H // groups, width).sum(3, dtype="float32").astype(x.dtype)
