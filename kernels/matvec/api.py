"""The one entry to the products of a decode step."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import dispatch
from ..dispatch import check_array

IMPLEMENTATIONS = {  # as `kernels.dispatch` says
    "pallas_triton": f"{__package__}.pallas_triton",
    "xla": f"{__package__}.plain",
}


def matvec(
    x: Float[Array, "B D"],
    weight: Float[Array, "N D"],
    *,
    norm_weight: Float[Array, "_"] | None = None,
    eps: float = 1e-6,
    gate: Float[Array, "B _"] | None = None,
    swiglu: bool = False,
    residual: Float[Array, "B _"] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "B _"]:
    """y = residual + act(silu(gate) * norm(x) W^T), whatever of it is asked for: one pass over W, no other kernel.

    A decode step at a small batch takes the time of reading its weights, as long as it is few kernels; the norm of x
    is computed again by every block of rows, which costs nothing beside that.

    Args:
      x: bfloat16 or float32. Rounded to its own dtype after the norm and the gate, as separate layers would.
      weight: W, rows are outputs, in x's dtype. With ``swiglu`` N is even and W is [W_gate; W_up].
      norm_weight: RMS norm of x over heads of this width, D / H of them, with this weight in each.
      eps: added to the mean square.
      gate: after the norm x is multiplied by silu of the gate's last D columns.
      swiglu: y = silu(x W_gate^T) * (x W_up^T), of width N / 2.
      residual: [B, width of y], added last.
      dtype: of y; x's when None.
      implementation: "pallas_triton" (GPUs; B at most 8), "xla", or None for the fastest that supports this call.

    Raises:
      ValueError: a wrong shape or dtype; the message gives argument, got, and wanted.
      NotImplementedError: the named implementation cannot run this call; the message says why.
    """
    sizes = {}
    check_array("x", x, "B D", sizes)
    check_array("weight", weight, "N D", sizes, x.dtype)
    batch, width = x.shape
    outputs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    if swiglu and weight.shape[0] % 2:
        raise ValueError(f"weight: got {weight.shape[0]} rows, wanted an even number with swiglu")
    if norm_weight is not None and (norm_weight.ndim != 1 or width % norm_weight.shape[0]):
        raise ValueError(f"norm_weight: got shape {norm_weight.shape}, wanted [a divisor of D={width}]")
    if gate is not None and (gate.ndim != 2 or gate.shape[0] != batch or gate.shape[1] < width):
        raise ValueError(f"gate: got shape {gate.shape}, wanted [B={batch}, at least D={width}]")
    if residual is not None and residual.shape != (batch, outputs):
        raise ValueError(f"residual: got shape {residual.shape}, wanted [B={batch}, {outputs}]")
    options = {"norm_weight": norm_weight, "gate": gate, "residual": residual, "swiglu": swiglu}
    module = dispatch.module_for(implementation, IMPLEMENTATIONS, x, weight, **options)
    return module.matvec(x, weight, **options, eps=eps, dtype=jnp.dtype(x.dtype if dtype is None else dtype))
