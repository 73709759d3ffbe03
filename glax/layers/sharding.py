"""Logical axis names: on parameters, and on activations where the compiler needs to be told."""

import jax
from flax import nnx
from flax.core import spmd
from jaxtyping import Array, Float

# Axes of parameters are named embed, heads, kv_heads, mlp, state, vocab, gate and layers, or None; those of activations
# batch and length besides. `nnx.logical_axis_rules` maps names to mesh axes.
Axes = tuple[str | None, ...]


def parameter(value: Float[Array, "..."], axes: Axes) -> nnx.Param:
    """A parameter that carries the logical names of its axes; whoever places it on a mesh reads them."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def constrain(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """Shard x as its logical axes say, under a mesh and rules; else x as it is."""
    if not spmd.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spmd.apply_rules(axes, None))
