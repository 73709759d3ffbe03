"""Softmax attention with rotary positions: the mixer of Llama, and of the attention layers of hybrid models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from glax.layers.linear import Linear
from glax.layers.rotary import rotate
from glax.layers.sequence_parallel import sequence_axis, softmax_attention


class SoftmaxAttentionState(NamedTuple):
    """A cache of S keys and values; the token at position p lies in slot p mod S.

    Attributes:
        keys, values: keys are rotated already.
        positions: of the token in each slot, -1 where there is none.
        length: tokens seen, the position of the next one.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    positions: Int[Array, "B S"]
    length: Int[Array, "B"]


class SoftmaxAttention(nnx.Module):
    """o_t = sum over s <= t of softmax_s(K^-0.5 q_t . k_s) v_s, then o_proj; q and k rotated by their positions.

    Args:
        hidden_size: D, width of x and y; K = D / H.
        num_heads: H, query heads.
        num_kv_heads: G, heads of keys and values; H when None. Query head h reads head h // (H / G).
        window: a token sees itself and the window - 1 tokens before it; all before it when None.
        rope_base: base of the rotary frequencies.
        std: of the initial weights.
        dtype: of the computation. The softmax is float32.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        window: int | None = None,
        rope_base: float = 10000.0,
        std: float = 0.02,
        dtype: DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_width = hidden_size // num_heads
        self.window = window
        self.rope_base = rope_base
        self.dtype = dtype
        queries, keys = num_heads * self.head_width, self.num_kv_heads * self.head_width
        options = {"std": std, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(hidden_size, queries, axes=("embed", "heads"), **options)
        self.k_proj = Linear(hidden_size, keys, axes=("embed", "kv_heads"), **options)
        self.v_proj = Linear(hidden_size, keys, axes=("embed", "kv_heads"), **options)
        self.o_proj = Linear(queries, hidden_size, axes=("heads", "embed"), **options)

    def init_state(self, batch: int, max_length: int | None = None) -> SoftmaxAttentionState:
        """An empty cache for ``max_length`` tokens, or for the window where that is shorter.

        Raises ValueError where neither bounds it. Without a window it must never get more than ``max_length`` tokens.
        """
        sizes = [size for size in (self.window, max_length) if size is not None]
        if not sizes:
            raise ValueError("softmax attention without a window keeps every token: init_state needs max_length")
        shape = (batch, min(sizes), self.num_kv_heads, self.head_width)
        return SoftmaxAttentionState(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            positions=jnp.full(shape[:2], -1, jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: SoftmaxAttentionState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], SoftmaxAttentionState | None]:
        """All tokens at once.

        ``segment_ids``: tokens see their own segment only, and positions restart in each; the cache belongs to a row's
        first. ``state``: of the tokens before; where it is given the new one is returned, else None. ``lengths``:
        tokens of each row that count for the new state; the rest of the row is padding.
        """
        segments, starts = _segments(segment_ids, *x.shape[:2])
        positions = jnp.arange(x.shape[1]) - starts
        if state is not None:
            positions += jnp.where(segments == 0, state.length[:, None], 0)
        q, k, v = self._inputs(x, positions)
        if state is None:
            return self._output(self._attend_causally(q, k, v, None if segment_ids is None else segments)), None

        length = state.positions.shape[1]
        mask = self._visible(positions, jnp.concatenate([state.positions, positions], 1))
        mask &= segments[:, :, None] == jnp.pad(segments, ((0, 0), (length, 0)))[:, None]
        keys, values = jnp.concatenate([state.keys, k], 1), jnp.concatenate([state.values, v], 1)
        o = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
        return self._output(o), _extend(state, k, v, positions, segments, lengths)

    def step(
        self, x: Float[Array, "B D"], state: SoftmaxAttentionState
    ) -> tuple[Float[Array, "B D"], SoftmaxAttentionState]:
        """One token: y and the new state. The token takes its slot first, then all slots in sight are read."""
        positions = state.length[:, None]
        q, k, v = self._inputs(x[:, None], positions)
        state = _extend(state, k, v, positions, jnp.zeros_like(positions), None)
        mask = self._visible(positions, state.positions)
        o = jax.nn.dot_product_attention(q, state.keys, state.values, mask=mask[:, None])
        return self._output(o)[:, 0], state

    def flops_per_token(self, length: int) -> float:
        """Multiplications and additions of q k^T and its product with v, forward, the mean over ``length`` tokens."""
        seen = length if self.window is None else min(self.window, length)
        mean = seen - seen * (seen - 1) / (2 * length)  # the first tokens have fewer before them
        return 4 * self.num_heads * self.head_width * mean

    def _inputs(self, x, positions):
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self.head_width) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base), v

    @jax.named_scope("operator")
    def _attend_causally(self, q, k, v, segments):
        if sequence_axis() is not None:
            return softmax_attention(q, k, v, segments=segments, window=self.window)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if segments is None else (segments[:, :, None] == segments[:, None])[:, None],
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            implementation="cudnn" if _cudnn_can(q) else "xla",
        )

    def _visible(self, queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
        """Which keys each query may see, by their positions."""
        back = queries[:, :, None] - keys[:, None]
        visible = (back >= 0) & (keys[:, None] >= 0)
        return visible if self.window is None else visible & (back < self.window)

    def _output(self, o):
        return self.o_proj(checkpoint_name(o, "token_mixing").reshape(*o.shape[:2], -1))


def _cudnn_can(q) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _segments(segment_ids, batch, length) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Of each token the number of its segment, from 0 in each row, and the index of its segment's first token."""
    if segment_ids is None:
        zeros = jnp.zeros((batch, length), jnp.int32)
        return zeros, zeros
    changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = jax.lax.cummax(jnp.where(changes, jnp.arange(length), 0), axis=1)
    return jnp.cumsum(changes, 1), starts


def _extend(state, k, v, positions, segments, lengths) -> SoftmaxAttentionState:
    """The cache after these tokens: of those of the last segment, the last S."""
    batch, length = positions.shape
    slots = state.positions.shape[1]
    lengths = jnp.full(batch, length) if lengths is None else lengths
    last = jnp.maximum(lengths - 1, 0)[:, None]
    segment = jnp.take_along_axis(segments, last, 1)
    end = jnp.where(lengths > 0, jnp.take_along_axis(positions, last, 1)[:, 0] + 1, state.length)
    kept = (jnp.arange(length) < lengths[:, None]) & (segments == segment) & (positions >= end[:, None] - slots)
    # The slot S does not exist: what goes there is dropped.
    where = (jnp.arange(batch)[:, None], jnp.where(kept, positions % slots, slots))
    return SoftmaxAttentionState(
        keys=state.keys.at[where].set(k, mode="drop"),
        values=state.values.at[where].set(v, mode="drop"),
        positions=jnp.where(segment == 0, state.positions, -1).at[where].set(positions, mode="drop"),
        length=end,
    )
