"""The language model: embedding, blocks, norm, logits."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from glax.layers import Linear, RMSNorm, embed, parameter
from glax.models.blocks import Block, Stack, unstacked
from glax.models.config import ModelConfig


class LanguageModel(nnx.Module):
    """Predicts each next token. There is no positional encoding but that of a mixer.

    Attributes:
        blocks: ``Block``s, or with ``scan_layers`` a ``Stack`` for each run of blocks with the same mixer. Either way
            the same ``rngs`` give the same initial parameters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        embedding = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = parameter(embedding, ("vocab", "embed"))
        self.blocks = nnx.List(_blocks(config, jax.random.split(rngs.params(), config.num_layers)))
        self.norm = RMSNorm(config.hidden_size, axes=("embed",), eps=config.norm_eps, dtype=config.dtype)
        head = {"axes": ("embed", "vocab"), "std": config.initializer_range, "dtype": config.dtype, "rngs": rngs}
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, **head)

    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T vocab"]:
        """Logits of the token after each, float32."""
        return self._logits(self.hidden(tokens, segment_ids=segment_ids))

    def hidden(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What the logits are made of: the output of the last norm, in the compute dtype.

        Nothing passes from one token to another across a change of ``segment_ids``.
        """
        x = self._embed(tokens)
        for block in self.blocks:
            x, _ = block(x, segment_ids=segment_ids)
        return self.norm(x)

    def unembedding(self) -> Float[Array, "D vocab"]:
        """The matrix from ``hidden`` to logits, in the compute dtype."""
        matrix = self.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return matrix.astype(self.config.dtype)

    def init_state(self, batch_size: int, max_length: int | None = None) -> list[Any]:
        """The state before any token, an entry per element of ``blocks``.

        ``max_length`` is how many tokens it must be able to take; it matters only to softmax attention without a
        window, which raises ValueError for None. All other states have one size for any length.
        """
        return [block.init_state(batch_size, max_length) for block in self.blocks]

    def by_layer(self, state: list[Any]) -> list[Any]:
        """A state with an entry for each layer, whether or not they are stacked here."""
        layers = []
        for element, of_element in zip(self.blocks, state, strict=True):
            layers += unstacked(of_element, element.count) if isinstance(element, Stack) else [of_element]
        return layers

    def by_element(self, layers: list[Any]) -> list[Any]:
        """The inverse of ``by_layer``."""
        state, first = [], 0
        for element in self.blocks:
            count = element.count if isinstance(element, Stack) else 1
            mine = layers[first : first + count]
            stacked = isinstance(element, Stack)
            state.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine) if stacked else mine[0])
            first += count
        return state

    def read(
        self,
        tokens: Int[Array, "B T"],
        state: list[Any],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """``hidden`` of tokens that follow those of ``state``, and the state after them.

        ``lengths``: tokens of each row that count; the rest of the row is padding. The state belongs to a row's first
        segment, the new one to its last.
        """
        if lengths is not None and segment_ids is not None:
            # Padding must not end the last segment, whose state is kept.
            last = jnp.minimum(jnp.arange(tokens.shape[1]), jnp.maximum(lengths - 1, 0)[:, None])
            segment_ids = jnp.take_along_axis(segment_ids, last, 1)
        x = self._embed(tokens)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block(x, segment_ids=segment_ids, state=before, lengths=lengths)
            after.append(new)
        return self.norm(x), after

    def prefill(
        self, tokens: Int[Array, "B T"], state: list[Any], *, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B vocab"], list[Any]]:
        """``read``, and the logits after the last token of each row."""
        hidden, state = self.read(tokens, state, lengths=lengths)
        lengths = jnp.full(tokens.shape[0], tokens.shape[1]) if lengths is None else lengths
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self._logits(jnp.take_along_axis(hidden, last, 1)[:, 0]), state

    def step(self, tokens: Int[Array, "B"], state: list[Any]) -> tuple[Float[Array, "B vocab"], list[Any]]:
        """One token of each row: the logits after it, and the new state."""
        x = self._embed(tokens)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.step(x, before)
            after.append(new)
        return self._logits(self.norm(x)), after

    def _embed(self, tokens):
        return embed(self.embedding[...], tokens, self.config.dtype)

    def _logits(self, hidden):
        return jnp.dot(hidden, self.unembedding(), preferred_element_type=jnp.float32)


def _blocks(config: ModelConfig, keys: Array) -> list[Block | Stack]:
    def make(mixer, key):
        return Block(config, mixer, rngs=nnx.Rngs(key))

    if not config.scan_layers:
        return [make(mixer, key) for mixer, key in zip(config.mixers, keys, strict=True)]
    runs = itertools.groupby(range(config.num_layers), lambda depth: config.mixers[depth])
    return [
        Stack(functools.partial(make, mixer), keys[jnp.array(list(depths))], unroll=config.unroll_layers)
        for mixer, depths in runs
    ]
