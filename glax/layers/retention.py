"""Multi-scale retention, the mixer of RetNet (Sun et al. 2023, arXiv 2307.08621)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers.heads import gated_output, split_heads
from glax.layers.linear import Linear, RMSNorm
from glax.layers.rotary import rotate
from glax.layers.sequence_parallel import linear_attention
from kernels import retention, retention_step


class RetentionState(NamedTuple):
    """What the layer keeps of the tokens before.

    Attributes:
        memory: S of each head, float32.
        length: tokens seen, the position of the next one.
    """

    memory: Float[Array, "B H K V"]
    length: Int[Array, "B"]


def log_decays(num_heads: int) -> Float[Array, "H"]:
    """log gamma_h with gamma_h = 1 - 2^(-5-h), h = 0..H-1: each head forgets half as fast as the one before."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads, dtype=jnp.float32))))


class MultiScaleRetention(nnx.Module):
    """y = (swish(x W_r) * norm(o)) W_O; S_t = gamma_h S_{t-1} + k_t^T v_t, o_t = K^-0.5 q_t S_t, q and k rotated.

    Args:
        hidden_size: D, width of x and y.
        num_heads: H. K = expand_k D / H, V = expand_v D / H.
        rope_base: base of the rotary frequencies.
        norm_eps: of the norm of o, which is over V, per head, with one weight [V] for all heads.
        std: of the initial weights.
        dtype: of the computation. The norm and the state are float32.
        implementation: of the operator, see ``kernels.retention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.key_width = round(hidden_size * expand_k) // num_heads
        self.value_width = round(hidden_size * expand_v) // num_heads
        self.rope_base = rope_base
        self.implementation = implementation

        keys, values = num_heads * self.key_width, num_heads * self.value_width
        options = {"std": std, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(hidden_size, keys, axes=("embed", "heads"), **options)
        self.k_proj = Linear(hidden_size, keys, axes=("embed", "heads"), **options)
        self.v_proj = Linear(hidden_size, values, axes=("embed", "heads"), **options)
        self.g_proj = Linear(hidden_size, values, axes=("embed", "heads"), **options)
        self.o_proj = Linear(values, hidden_size, axes=("heads", "embed"), **options)
        self.o_norm = RMSNorm(self.value_width, eps=norm_eps, dtype=jnp.float32)

    def init_state(self, batch: int, max_length: int | None = None) -> RetentionState:
        """The state before any token. Its size does not depend on ``max_length``."""
        memory = jnp.zeros((batch, self.num_heads, self.key_width, self.value_width), jnp.float32)
        return RetentionState(memory, jnp.zeros(batch, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: RetentionState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RetentionState | None]:
        """All tokens at once.

        ``segment_ids``: nothing passes from one segment to the next. ``state``: of the tokens before; where it is given
        the new one is returned, else None. ``lengths``: tokens of each row that count for the new state; the rest of
        the row is padding.
        """
        # Rotations are relative: positions need not restart in a segment.
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        q, k, v = self._inputs(x, positions if state is None else positions + state.length[:, None])
        log_gamma = log_decays(self.num_heads)
        if lengths is not None:
            real = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            # A token with a zero key that lets nothing decay leaves the memory as it is.
            k, log_gamma = jnp.where(real[..., None], k, 0), jnp.where(real, log_gamma, 0)
        before = None if state is None else state.memory
        options = {"segment_ids": segment_ids, "implementation": self.implementation}
        o, memory = linear_attention(retention, q, k, v, log_gamma, state=before, **options)
        if state is not None:
            state = RetentionState(memory, state.length + (x.shape[1] if lengths is None else lengths))
        return self._output(checkpoint_name(o, "token_mixing"), x), state

    def step(self, x: Float[Array, "B D"], state: RetentionState) -> tuple[Float[Array, "B D"], RetentionState]:
        """One token: y and the new state, by the recurrence."""
        x = x[:, None]
        q, k, v = self._inputs(x, state.length[:, None])
        o, memory = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decays(self.num_heads), state.memory)
        return self._output(o[:, None], x)[:, 0], RetentionState(memory, state.length + 1)

    def flops_per_token(self, length: int) -> float:
        """Multiplications and additions of the operator, forward, without the projections: k^T v and q S."""
        return 4 * self.num_heads * self.key_width * self.value_width

    def _inputs(self, x, positions):
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (split_heads(y, self.num_heads) for y in projected)
        return rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base), v

    def _output(self, o, x):
        return gated_output(o, x, self.o_norm, self.g_proj, self.o_proj)
