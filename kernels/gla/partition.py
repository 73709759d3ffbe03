"""Runs a kernel on each device's share of the batch and the heads, under jit, shard_map and vmap.

XLA cannot see into a kernel call and would gather its inputs; `shard_over_batch_and_heads` tells it that rows of the
batch and groups of heads are independent.
"""

from collections.abc import Callable, Sequence

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ..dispatch import with_auto_mesh


def shard_over_batch_and_heads(fn: Callable, inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
    """A function like `fn`, run per shard.

    `fn` takes and returns arrays (a tuple of them), of any batch and any number of heads, and treats rows of the batch
    and groups of heads alike and apart. `inputs` and `outputs` name the axes of each: "B T H K" for queries, "B T G K"
    for keys, "B H K V" for states, "B T" for segment ids. B, and with it H and G (H a multiple of G, query head h
    reading group h // (H / G)), stay as sharded as the first input is, as far as their sizes divide; where H is sharded
    more ways than G divides, heads are gathered first, since a device then has no whole group. Every other axis is
    gathered. An output with neither H nor G is a sum over heads: each device's part is added to the others'. Constant
    arrays are inputs too, with axes of other names: custom_partitioning takes no function that holds any.

    Vmapped axes become part of B. There is no derivative: call it inside the forward and backward rules of a
    custom_vjp.
    """
    inputs, outputs = [axes.split() for axes in inputs], [axes.split() for axes in outputs]
    partitioned = custom_partitioning(lambda *arrays: tuple(fn(*arrays)))

    def partition(mesh, arrays, results):
        batch, heads = _shardings(mesh, arrays, inputs)

        def sharding(axes):
            names = {"B": batch, "H": heads, "G": heads}
            return NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in axes)))

        def shard(*arrays):
            parts = zip(fn(*arrays), outputs, strict=True)
            return tuple(x if heads is None or {"H", "G"} & set(axes) else jax.lax.psum(x, heads) for x, axes in parts)

        return mesh, with_auto_mesh(shard), tuple(map(sharding, outputs)), tuple(map(sharding, inputs))

    partitioned.def_partition(partition, sharding_rule=lambda mesh, arrays, results: _rule(inputs, outputs, arrays))

    @custom_vmap
    def batched(*arrays):
        return partitioned(*arrays)

    @batched.def_vmap
    def fold(size, in_batched, *arrays):
        arrays = [
            _fold(x, size, is_batched) if "B" in axes else x
            for x, axes, is_batched in zip(arrays, inputs, in_batched, strict=True)
        ]
        return tuple(_unfold(x, size) for x in batched(*arrays)), (True,) * len(outputs)

    return batched


def _shardings(mesh, arrays, axes_of):
    """The mesh axes over which B, and H and G, are sharded, as the first array has them."""
    sizes = {
        axis: size for x, axes in zip(arrays, axes_of, strict=True) for axis, size in zip(axes, x.shape, strict=True)
    }
    spec = dict(zip(axes_of[0], arrays[0].sharding.spec, strict=True))
    batch, heads = spec["B"], spec.get("H", spec.get("G"))
    return tuple(
        axes if all(size % _ways(mesh, axes) == 0 for size in of) else None
        for axes, of in ((batch, [sizes["B"]]), (heads, [sizes[axis] for axis in "HG" if axis in sizes]))
    )


def _ways(mesh, axes):
    ways = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        ways *= mesh.shape[axis]
    return ways


def _rule(inputs, outputs, arrays):
    """Shardy's rule: B and G are passed through, H is G groups of query heads, and no other axis may stay sharded."""
    sizes = {
        axis: size for x, axes in zip(arrays, inputs, strict=True) for axis, size in zip(axes, x.shape, strict=True)
    }
    groups, ratio = sizes.get("G"), sizes.get("H", 1) // sizes.get("G", sizes.get("H", 1))
    # Shardy takes no factor of size 1 among others.
    heads = [factor for factor, size in (("g", groups), ("r", ratio)) if size != 1] or ["g"]
    order = dict.fromkeys(
        factor for axes in (*inputs, *outputs) for a in axes for factor in (heads if a == "H" else a.lower())
    )
    gathered = tuple(factor for factor in order if factor not in "bg")
    heads_factor = heads[0] if len(heads) == 1 else f"({' '.join(heads)})"
    sides = (
        ", ".join(" ".join(heads_factor if a == "H" else a.lower() for a in axes) for axes in side)
        for side in (inputs, outputs)
    )
    return " -> ".join(sides), {"need_replication_factors": gathered} | ({"r": ratio} if len(heads) == 2 else {})


def _fold(x, size, is_batched):
    """[size, B, ...], or [B, ...] for all of them, to [B * size, ...]: B outermost keeps its sharding."""
    x = jax.numpy.moveaxis(x, 0, 1) if is_batched else jax.numpy.repeat(x[:, None], size, 1)
    return x.reshape(-1, *x.shape[2:])


def _unfold(x, size):
    return jax.numpy.moveaxis(x.reshape(-1, size, *x.shape[1:]), 1, 0)
