"""Runs a function on each device's share of tokens and vocabulary, with the mesh axes over which to sum."""

from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ..dispatch import with_auto_mesh


def shard_over_tokens_and_vocabulary(fn: Callable, rule: str) -> Callable:
    """`fn(*arrays, token_axes, vocab_axes)`, run per shard of the axes n and v of `rule`, such as "n d, d v -> n d".

    The first array has n first and the second v last; as they are sharded, so is every n and v, where their sizes
    divide. The two keywords are tuples of names of mesh axes; fn sums over them what it sums over n or v. Other axes
    are gathered.
    """
    inputs, outputs = ([axes.split() for axes in side.split(",")] for side in rule.split("->"))
    call = custom_partitioning(lambda *arrays: fn(*arrays, token_axes=(), vocab_axes=()))

    def partition(mesh, arrays, results):
        token_axes = _dividing(mesh, arrays[0].sharding.spec[0], arrays[0].shape[0])
        vocab_axes = _dividing(mesh, arrays[1].sharding.spec[1], arrays[1].shape[1])

        def sharding(axes):
            return NamedSharding(mesh, PartitionSpec(*({"n": token_axes, "v": vocab_axes}.get(axis) for axis in axes)))

        def run(*shards):
            return fn(*shards, token_axes=token_axes, vocab_axes=vocab_axes)

        return mesh, with_auto_mesh(run), tuple(map(sharding, outputs)), tuple(map(sharding, inputs))

    call.def_partition(partition, sharding_rule=rule, need_replication_factors=("d",))
    return jax.custom_batching.sequential_vmap(call)


def _dividing(mesh, axes, size) -> tuple[str, ...]:
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    ways = 1
    for axis in axes:
        ways *= mesh.shape[axis]
    return axes if size % ways == 0 else ()
