"""One block of the model, and equal blocks in a scan."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from glax.layers import (
    GatedLinearAttention,
    Mamba,
    MultiScaleRetention,
    RMSNorm,
    SoftmaxAttention,
    SwiGLU,
    constrain,
)
from glax.models.config import ModelConfig
from kernels.dispatch import platform_of


def _gated_linear_attention(config: ModelConfig, rngs: nnx.Rngs) -> GatedLinearAttention:
    return GatedLinearAttention(
        config.hidden_size,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        gate=config.gate,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        gate_rank=config.gate_rank,
        gate_temperature=config.gate_temperature,
        clamp_min=config.clamp_min,
        feature_map=config.feature_map,
        output_gate=config.output_gate,
        short_conv_width=config.short_conv_width,
        norm_eps=config.norm_eps,
        std=config.initializer_range,
        dtype=config.dtype,
        implementation=config.implementation,
        rngs=rngs,
    )


def _softmax_attention(config: ModelConfig, rngs: nnx.Rngs) -> SoftmaxAttention:
    return SoftmaxAttention(
        config.hidden_size,
        config.attention_heads or config.num_heads,
        num_kv_heads=config.attention_kv_heads,
        window=config.attention_window,
        rope_base=config.rope_base,
        std=config.initializer_range,
        dtype=config.dtype,
        rngs=rngs,
    )


def _retention(config: ModelConfig, rngs: nnx.Rngs) -> MultiScaleRetention:
    return MultiScaleRetention(
        config.hidden_size,
        config.num_heads,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        rope_base=config.rope_base,
        norm_eps=config.norm_eps,
        std=config.initializer_range,
        dtype=config.dtype,
        implementation=config.implementation,
        rngs=rngs,
    )


def _mamba(config: ModelConfig, rngs: nnx.Rngs) -> Mamba:
    return Mamba(
        config.hidden_size,
        expand=config.expand_v,
        state_size=config.state_size,
        conv_width=config.short_conv_width or 4,
        std=config.initializer_range,
        dtype=config.dtype,
        implementation=config.implementation,
        rngs=rngs,
    )


# Token mixers by their name in ModelConfig. What they make has, with one layer's state S, of any type:
#   __call__(x [B,T,D], *, segment_ids, state: S | None, lengths) -> (y [B,T,D], S | None)
#   init_state(batch, max_length: int | None) -> S
#   step(x [B,D], S) -> (y [B,D], S)
#   flops_per_token(length) -> float
MIXERS: dict[str, Callable[[ModelConfig, nnx.Rngs], nnx.Module]] = {
    "gla": _gated_linear_attention,
    "attention": _softmax_attention,
    "retnet": _retention,
    "mamba": _mamba,
}

# What shards of a sequence have told each other (kernels.sequence_parallel) is kept: sent once, not twice.
SAVED = {
    "full": jax.checkpoint_policies.save_only_these_names("sequence_exchange"),
    "matmuls": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("token_mixing", "sequence_exchange"),
    ),
}


class Block(nnx.Module):
    """y = x + mixer(norm(x)), then y + mlp(norm(y)). The residual stream has the compute dtype."""

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        norm = {"axes": ("embed",), "eps": config.norm_eps, "dtype": config.dtype}
        self.mixer_norm = RMSNorm(config.hidden_size, **norm)
        self.mixer = MIXERS[mixer](config, rngs)
        mlp = {"std": config.initializer_range, "dtype": config.dtype, "rngs": rngs}
        has_mlp = config.mlp_width > 0
        self.mlp_norm = RMSNorm(config.hidden_size, **norm) if has_mlp else None
        self.mlp = SwiGLU(config.hidden_size, config.mlp_width, **mlp) if has_mlp else None
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
        lengths: Int[Array, "B"] | None = None,
        scanned: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """All tokens at once; see the mixers for the arguments. ``scanned``: this is the body of a scan."""
        rules = tuple(spmd.get_logical_axis_rules())  # what is traced depends on them
        return _run(rules, scanned, self, x, segment_ids, state, lengths)

    def _forward(self, x, segment_ids, state, lengths):
        with jax.named_scope("norm"):
            normed = self.mixer_norm(x)
        with jax.named_scope("mixer"):
            mixed, state = self.mixer(normed, segment_ids=segment_ids, state=state, lengths=lengths)
        x = self._add_mlp(x + mixed)
        return constrain(x, "batch", "length", None), state

    def init_state(self, batch: int, max_length: int | None) -> Any:
        return self.mixer.init_state(batch, max_length)

    def step(self, x: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        """One token."""
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        return self._add_mlp(x + mixed), state

    def flops_per_token(self, length: int) -> float:
        """Of the token mixing alone, forward."""
        return self.mixer.flops_per_token(length)

    def _add_mlp(self, x):
        if self.mlp is None:
            return x
        with jax.named_scope("norm"):
            normed = self.mlp_norm(x)
        with jax.named_scope("mlp"):
            return x + self.mlp(normed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(rules: tuple, scanned: bool, block: Block, *arguments):
    """A block's forward pass. Equal blocks are traced, differentiated and lowered once, however many there are."""
    if block.remat == "none":
        return block._forward(*arguments)
    # In a scan the compiler cannot merge the second computation with the first, so it needs no barrier against it.
    return jax.checkpoint(Block._forward, policy=SAVED[block.remat], prevent_cse=not scanned)(block, *arguments)


class Stack(nnx.Module):
    """Equal blocks, one after the other: parameters and states have a leading axis of layers.

    As one scan it compiles once for all layers, but what the backward pass needs is copied into stacks of all layers
    and out again; ``unroll`` leaves the blocks one by one to the compiler. None: on GPUs, where no state is carried on;
    but with full remat, which leaves little to copy, a mesh scans, as fast. One by one XLA would run ahead in other
    layers to hide what is sent, and hold what it is not to hold: twice a scan's memory at 7 B parameters over 64 GPUs.
    """

    def __init__(self, make: Callable[[PRNGKeyArray], Block], keys: Key[Array, "layers"], *, unroll: bool | None):
        stacked = jax.vmap(make)(keys)
        self.block = nnx.spmd.add_axis(stacked, 0, {nnx.PARTITION_NAME: "layers"})
        self.count = len(keys)
        self.unroll = unroll

    def __call__(self, x, *, segment_ids=None, state=None, lengths=None):
        if self._unrolled(x, state):
            after = []
            for block, before in zip(unstacked(self.block, self.count), unstacked(state, self.count), strict=True):
                x, new = block(x, segment_ids=segment_ids, state=before, lengths=lengths)
                after.append(new)
            return x, jax.tree.map(lambda *layers: jnp.stack(layers), *after)

        def layer(x, block_and_state):
            block, state = block_and_state
            return block(x, segment_ids=segment_ids, state=state, lengths=lengths, scanned=True)

        return jax.lax.scan(layer, x, (self.block, state))

    def _unrolled(self, x, state) -> bool:
        if self.unroll is not None:
            return self.unroll
        sends = jax.sharding.get_abstract_mesh().size > 1
        return state is None and platform_of(x) == "gpu" and not (sends and self.block.remat == "full")

    def init_state(self, batch: int, max_length: int | None) -> Any:
        state = self.block.init_state(batch, max_length)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), state)

    def step(self, x: Float[Array, "B D"], state: Any) -> tuple[Float[Array, "B D"], Any]:
        return jax.lax.scan(lambda x, layer: layer[0].step(x, layer[1]), x, (self.block, state))

    def flops_per_token(self, length: int) -> float:
        return self.count * self.block.flops_per_token(length)


def unstacked(tree: Any, count: int) -> list[Any]:
    """The parameters, or the states, of each layer of a ``Stack``."""
    leaves, structure = jax.tree.flatten(tree)
    layers = [jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [leaf[index] for leaf in layers]) for index in range(count)]
