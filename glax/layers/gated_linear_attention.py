"""The GLA layer (paper, Section 4.3), and the gates it is compared with (Table 4)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers.heads import gated_output, split_heads
from glax.layers.linear import Linear, RMSNorm
from glax.layers.retention import log_decays
from glax.layers.sequence_parallel import linear_attention
from glax.layers.short_convolution import ShortConvolution
from kernels import gated_linear_attention, gated_linear_attention_step, retention, retention_step

Gate = Literal["channel", "scalar", "fixed", "none"]

FEATURE_MAPS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
}


class GatedLinearAttentionState(NamedTuple):
    """What the layer keeps of the tokens before.

    Attributes:
        memory: S of each head, float32.
        convolutions: the last inputs of the convolutions of q, k and v; None without them.
    """

    memory: Float[Array, "B H K V"]
    convolutions: tuple[Float[Array, "B _ _"], ...] | None


class GatedLinearAttention(nnx.Module):
    """y = (swish(x W_r) * norm(o)) W_O; o is GLA of q, k, v and log_alpha = logsigmoid(x W_1 W_2 + b) / tau.

    Args:
        hidden_size: D, width of x and y.
        num_heads: H, query heads. K = expand_k D / H, V = expand_v D / H.
        num_kv_heads: G, heads of keys, values and gates; H when None. Query head h reads head h // (H / G).
        gate: what decays the memory. "channel": log_alpha as above, one per head and key channel. Else the operator is
            ``kernels.retention`` with one number per head: "scalar", logsigmoid(x W + b) / tau with W [D, H]; "fixed",
            RetNet's log(1 - 2^(-5-h)) for every token; "none", 0. These need as many kv heads as heads.
        gate_rank: columns of W_1.
        gate_temperature: tau.
        clamp_min: lower bound of log_alpha.
        feature_map: a name in FEATURE_MAPS, applied to q and k.
        output_gate: False leaves swish(x W_r) out.
        short_conv_width: taps of the causal convolution, followed by SiLU, of each of q, k and v; none when None.
        norm_eps: of the norm of o, which is over V, per head, with one weight [V] for all heads.
        std: of the initial weights.
        dtype: of the computation. The gates' logsigmoid, the norm and the state are float32.
        implementation: of the operator, see ``kernels.gated_linear_attention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        gate: Gate = "channel",
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        clamp_min: float | None = None,
        feature_map: str | None = None,
        output_gate: bool = True,
        short_conv_width: int | None = None,
        norm_eps: float = 1e-6,
        std: float = 0.02,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.key_width = round(hidden_size * expand_k) // num_heads
        self.value_width = round(hidden_size * expand_v) // num_heads
        self.gate = gate
        self.gate_temperature = gate_temperature
        self.clamp_min = clamp_min
        self.feature_map = feature_map
        self.dtype = dtype
        self.implementation = implementation

        queries, keys = num_heads * self.key_width, self.num_kv_heads * self.key_width
        values, outputs = self.num_kv_heads * self.value_width, num_heads * self.value_width
        options = {"std": std, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(hidden_size, queries, axes=("embed", "heads"), **options)
        self.k_proj = Linear(hidden_size, keys, axes=("embed", "kv_heads"), **options)
        self.v_proj = Linear(hidden_size, values, axes=("embed", "kv_heads"), **options)
        low_rank, scalar = gate == "channel", gate == "scalar"
        self.gk_down = Linear(hidden_size, gate_rank, axes=("embed", "gate"), **options) if low_rank else None
        self.gk_up = Linear(gate_rank, keys, axes=("gate", "kv_heads"), bias=True, **options) if low_rank else None
        self.gk_proj = Linear(hidden_size, num_heads, axes=("embed", "heads"), bias=True, **options) if scalar else None
        self.g_proj = Linear(hidden_size, outputs, axes=("embed", "heads"), **options) if output_gate else None
        self.o_proj = Linear(outputs, hidden_size, axes=("heads", "embed"), **options)
        self.o_norm = RMSNorm(self.value_width, eps=norm_eps, dtype=jnp.float32)

        def convolution(channels: int, axis: str) -> ShortConvolution | None:
            if short_conv_width is None:
                return None
            return ShortConvolution(channels, short_conv_width, axis=axis, dtype=dtype, rngs=rngs)

        self.q_conv = convolution(queries, "heads")
        self.k_conv = convolution(keys, "kv_heads")
        self.v_conv = convolution(values, "kv_heads")

    def init_state(self, batch: int, max_length: int | None = None) -> GatedLinearAttentionState:
        """The state before any token. Its size does not depend on ``max_length``."""
        memory = jnp.zeros((batch, self.num_heads, self.key_width, self.value_width), jnp.float32)
        if self.q_conv is None:
            return GatedLinearAttentionState(memory, None)
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        return GatedLinearAttentionState(memory, tuple(conv.init_state(batch) for conv in convolutions))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: GatedLinearAttentionState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedLinearAttentionState | None]:
        """All tokens at once.

        ``segment_ids``: nothing passes from one segment to the next. ``state``: of the tokens before; where it is given
        the new one is returned, else None. ``lengths``: tokens of each row that count for the new state; the rest of
        the row is padding.
        """
        q, k, v, log_alpha, convolutions = self._inputs(x, segment_ids, state, lengths)
        if lengths is not None:
            real = jnp.arange(x.shape[1]) < lengths[:, None]
            # A token with a zero key and an open gate leaves the memory as it is.
            k = jnp.where(real[..., None, None], k, 0)
            log_alpha = jnp.where(real[..., None, None] if log_alpha.ndim == 4 else real[..., None], log_alpha, 0)
        operator = gated_linear_attention if self.gate == "channel" else retention
        before = None if state is None else state.memory
        options = {"segment_ids": segment_ids, "implementation": self.implementation}
        o, memory = linear_attention(operator, q, k, v, log_alpha, state=before, **options)
        if state is not None:
            state = GatedLinearAttentionState(memory, convolutions)
        return self._output(checkpoint_name(o, "token_mixing"), x), state

    def step(
        self, x: Float[Array, "B D"], state: GatedLinearAttentionState
    ) -> tuple[Float[Array, "B D"], GatedLinearAttentionState]:
        """One token: y and the new state, by the recurrence."""
        x = x[:, None]
        q, k, v, log_alpha, convolutions = self._inputs(x, None, state, None)
        operator = gated_linear_attention_step if self.gate == "channel" else retention_step
        log_alpha = log_alpha if log_alpha.ndim == 1 else log_alpha[:, 0]
        o, memory = operator(q[:, 0], k[:, 0], v[:, 0], log_alpha, state.memory)
        return self._output(o[:, None], x)[:, 0], GatedLinearAttentionState(memory, convolutions)

    def flops_per_token(self, length: int) -> float:
        """Multiplications and additions of the operator, forward, without the projections: k^T v and q S."""
        return 2 * self.key_width * self.value_width * (self.num_kv_heads + self.num_heads)

    def _inputs(self, x, segment_ids, state, lengths):
        """q, k, v and log_alpha of the operator, and the new states of the convolutions."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        convolutions = None
        if self.q_conv is not None:
            options = {"segment_ids": segment_ids, "lengths": lengths}
            before = (None, None, None) if state is None else state.convolutions
            q, q_last = self.q_conv(q, state=before[0], **options)
            k, k_last = self.k_conv(k, state=before[1], **options)
            v, v_last = self.v_conv(v, state=before[2], **options)
            convolutions = (q_last, k_last, v_last)
        if self.feature_map is not None:
            feature_map = FEATURE_MAPS[self.feature_map]
            q, k = feature_map(q), feature_map(k)
        return (
            split_heads(q, self.num_heads),
            split_heads(k, self.num_kv_heads),
            split_heads(v, self.num_kv_heads),
            self._log_alpha(x),
            convolutions,
        )

    def _log_alpha(self, x) -> Float[Array, "B T G K"] | Float[Array, "B T H"] | Float[Array, "H"]:
        if self.gate == "fixed":
            return log_decays(self.num_heads)
        if self.gate == "none":
            return jnp.zeros(self.num_heads, jnp.float32)
        gates = self.gk_proj(x, jnp.float32) if self.gate == "scalar" else self.gk_up(self.gk_down(x), jnp.float32)
        log_alpha = jax.nn.log_sigmoid(gates) / self.gate_temperature
        if self.clamp_min is not None:
            log_alpha = jnp.maximum(log_alpha, self.clamp_min)
        if self.gate == "scalar":
            return log_alpha
        # The Hopper kernels take gates in the dtype of their tiles.
        return split_heads(log_alpha.astype(self.dtype), self.num_kv_heads)

    def _output(self, o, x):
        return gated_output(o, x, self.o_norm, self.g_proj, self.o_proj)
