"""The one entry to the mixing of a GLA layer in a decode step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import dispatch
from ..dispatch import check_array

IMPLEMENTATIONS = {  # as `kernels.dispatch` says
    "pallas_triton": f"{__package__}.pallas_triton",
    "xla": f"{__package__}.plain",
}


class Widths(NamedTuple):
    """Sizes, and where in a row of ``projected`` q, k, v and the gates' low-rank input begin."""

    heads: int
    groups: int
    key: int
    value: int
    rank: int

    @property
    def offsets(self) -> tuple[int, int, int, int, int]:
        """Of q, k, v and the low-rank input, and the end of that."""
        q = self.heads * self.key
        k = q + self.groups * self.key
        v = k + self.groups * self.value
        return 0, q, k, v, v + self.rank


def gla_decode(
    projected: Float[Array, "B _"],
    gate_up: Float[Array, "R GK"],
    gate_bias: Float[Array, "GK"],
    state: Float[Array, "B H K V"],
    *,
    temperature: float,
    clamp_min: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B HV"], Float[Array, "B H K V"]]:
    """Eq. 3 of arXiv 2312.06635 for one token, gates included: the state is read once and written once.

    log_alpha = max(logsigmoid(r gate_up + gate_bias) / temperature, clamp_min), S' = diag(alpha) S + k^T v,
    o = K^-0.5 q S'.

    Args:
      projected: rows of [q (H K) | k (G K) | v (G V) | r (R) | anything], G = GK / K; query head h reads head
        h // (H / G). bfloat16 or float32; log_alpha is rounded to its dtype, as the operator over all tokens has it.
      gate_up, gate_bias: of the gates' low-rank map; the product is float32.
      state: S, float32.
      temperature: tau.
      clamp_min: lower bound of log_alpha.
      implementation: "pallas_triton" (GPUs; K a power of two), "xla", or None for the fastest that supports this call.

    Returns:
      o, all heads side by side, in projected's dtype, and S'.

    Raises:
      ValueError: a wrong shape or dtype; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says why.
    """
    sizes = {}
    check_array("state", state, "B H K V", sizes, jnp.float32)
    check_array("gate_up", gate_up, "R GK", sizes)
    check_array("gate_bias", gate_bias, "GK", sizes)
    check_array("projected", projected, "B N", sizes)
    batch, heads, key, value = state.shape
    rank, keys = gate_up.shape
    if keys % key or heads % (keys // key):
        raise ValueError(f"gate_up: got {keys} columns, wanted K={key} times a divisor of H={heads}")
    widths = Widths(heads, keys // key, key, value, rank)
    if projected.shape[1] < widths.offsets[-1]:
        raise ValueError(f"projected: got shape {projected.shape}, wanted [B={batch}, at least {widths.offsets[-1]}]")
    module = dispatch.module_for(implementation, IMPLEMENTATIONS, projected, state, widths=widths)
    return module.gla_decode(
        projected, gate_up, gate_bias, state, widths=widths, temperature=temperature, clamp_min=clamp_min
    )
