"""The selective state space layer of Mamba, version 1 (Gu and Dao 2023, arXiv 2312.00752)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers.linear import Linear
from glax.layers.sequence_parallel import state_space
from glax.layers.sharding import parameter
from glax.layers.short_convolution import ShortConvolution
from kernels import selective_scan_step

# Initial dt is log-uniform between these.
DT_MIN, DT_MAX = 1e-3, 1e-1


class MambaState(NamedTuple):
    """What the layer keeps of the tokens before.

    Attributes:
        memory: h of each channel, float32.
        convolution: the last inputs of the convolution.
    """

    memory: Float[Array, "B E N"]
    convolution: Float[Array, "B _ E"]


class Mamba(nnx.Module):
    """u = silu(conv(x W_in)); h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y = ((C_t h_t + D u_t) * silu(x W_z)) W_out.

    (dt', B, C) = u W_x with dt' of ceil(d / 16) columns, dt = softplus(dt' W_dt + b), A = -exp(A_log).

    Args:
        hidden_size: d, width of x and y.
        expand: the inner width E as a multiple of d.
        state_size: N.
        conv_width: taps of the convolution.
        std: of the initial W_in, W_z, W_x and W_out. The others start as in the authors' code: A_log at log(1..N),
            D at 1, W_dt uniform within rank^-0.5, b such that dt is log-uniform in [0.001, 0.1].
        dtype: of the computation. softplus, exp and the state are float32.
        implementation: of the operator, see ``kernels.selective_scan``.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: float = 2.0,
        state_size: int = 16,
        conv_width: int = 4,
        std: float = 0.02,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        inner, rank = round(hidden_size * expand), -(-hidden_size // 16)
        self.inner_size, self.state_size, self.dt_rank = inner, state_size, rank
        self.dtype = dtype
        self.implementation = implementation
        options = {"std": std, "dtype": dtype, "rngs": rngs}
        self.in_proj = Linear(hidden_size, inner, axes=("embed", "mlp"), **options)
        self.z_proj = Linear(hidden_size, inner, axes=("embed", "mlp"), **options)
        self.conv = ShortConvolution(inner, conv_width, axis="mlp", bias=True, dtype=dtype, rngs=rngs)
        self.x_proj = Linear(inner, rank + 2 * state_size, axes=("mlp", None), **options)
        self.dt_proj = Linear(rank, inner, axes=(None, "mlp"), bias=True, **options)
        self.out_proj = Linear(inner, hidden_size, axes=("mlp", "embed"), **options)

        kernel = jax.random.uniform(rngs.params(), (rank, inner), jnp.float32, -(rank**-0.5), rank**-0.5)
        self.dt_proj.kernel = parameter(kernel, (None, "mlp"))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (inner,), jnp.float32, math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_proj.bias = parameter(dt + jnp.log(-jnp.expm1(-dt)), ("mlp",))  # the inverse of softplus
        a_log = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32))
        self.a_log = parameter(jnp.broadcast_to(a_log, (inner, state_size)), ("mlp", "state"))
        self.d = parameter(jnp.ones(inner, jnp.float32), ("mlp",))

    def init_state(self, batch: int, max_length: int | None = None) -> MambaState:
        """The state before any token. Its size does not depend on ``max_length``."""
        return MambaState(
            jnp.zeros((batch, self.inner_size, self.state_size), jnp.float32), self.conv.init_state(batch)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: MambaState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState | None]:
        """All tokens at once.

        ``segment_ids``: nothing passes from one segment to the next. ``state``: of the tokens before; where it is given
        the new one is returned, else None. ``lengths``: tokens of each row that count for the new state; the rest of
        the row is padding.
        """
        memory, convolution = (None, None) if state is None else state
        u, convolution = self.conv(self.in_proj(x), segment_ids=segment_ids, state=convolution, lengths=lengths)
        dt, b, c = self._selection(u)
        if lengths is not None:
            real = jnp.arange(x.shape[1]) < lengths[:, None]
            dt = jnp.where(real[..., None], dt, 0)  # a token that takes no time leaves the memory as it is
        options = {"segment_ids": segment_ids, "implementation": self.implementation}
        y, memory = state_space(u, dt, -jnp.exp(self.a_log[...]), b, c, self.d[...], state=memory, **options)
        if state is not None:
            state = MambaState(memory, convolution)
        return self._output(checkpoint_name(y, "token_mixing"), x), state

    def step(self, x: Float[Array, "B D"], state: MambaState) -> tuple[Float[Array, "B D"], MambaState]:
        """One token: y and the new state, by the recurrence."""
        u, convolution = self.conv(self.in_proj(x[:, None]), state=state.convolution)
        u = u[:, 0]
        dt, b, c = self._selection(u)
        y, memory = selective_scan_step(u, dt, -jnp.exp(self.a_log[...]), b, c, self.d[...], state.memory)
        return self._output(y, x), MambaState(memory, convolution)

    def flops_per_token(self, length: int) -> float:
        """Multiplications and additions of the operator, forward, without the projections: dt B u and C h."""
        return 4 * self.inner_size * self.state_size

    def _selection(self, u):
        """dt, B and C of each token: how long it lasts, and what it writes and reads."""
        dt, b, c = jnp.split(self.x_proj(u), [self.dt_rank, self.dt_rank + self.state_size], -1)
        return jax.nn.softplus(self.dt_proj(dt, jnp.float32)).astype(self.dtype), b, c

    def _output(self, y, x):
        return self.out_proj(y * jax.nn.silu(self.z_proj(x)))
