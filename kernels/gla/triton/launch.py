"""Calls of the four kernels, in the words of jax_triton: grids, shapes of outputs, tiles."""

import inspect

import jax
import jax.numpy as jnp
import jax_triton

from . import gradients as gradients_kernels
from . import walk, weights
from .tiles import Tiles, tiles_for

CHUNK = 64
OUTPUTS = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"  # 0.4, 0.3


def launch(kernel, inputs, outputs, blocks, tile, capability, **constants):
    """One call: pointers to inputs, the padded length, pointers to outputs; a row of `blocks` programs."""
    T = inputs[0].shape[1]
    return jax_triton.triton_call(
        *inputs,
        T,
        kernel=kernel,
        grid=(blocks,),
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=capability,
        **{OUTPUTS: tuple(outputs)},
        **constants,
    )


class Kernels:
    """The kernels for one call's shapes and dtypes.

    Operands of products are bfloat16 where q, k and v are, else float32 with three TF32 products for one. Then all
    levels are taken, so that no bit of an output depends on a later gate.
    """

    def __init__(self, q, k, v, log_alpha, scale, capability):
        (self.B, self.T, self.H, self.K), (self.G, self.V) = q.shape, v.shape[2:]
        exact = not all(x.dtype == jnp.bfloat16 for x in (q, k, v))
        self.scale, self.capability = scale, capability
        self.operand = jnp.float32 if exact else jnp.bfloat16
        self.precision = "tf32x3" if exact else "tf32"
        self.limit = 0.0 if exact else 40.0  # nats: exp(2 * 40) times a product of ordinary values is finite in float32
        self.limbs = 3 if exact else 2
        self.gate_limbs = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2}.get(log_alpha.dtype, 3)
        self.tiles: Tiles = tiles_for(capability, self.K, self.V, exact)

    def prepare(self, q, k, log_alpha):
        B, T, H, G, K, tile = self.B, self.T, self.H, self.G, self.K, self.tiles.prepare
        outputs = (
            jax.ShapeDtypeStruct((B, T, H, K), self.operand),
            jax.ShapeDtypeStruct((B, T, G, K), self.operand),
            jax.ShapeDtypeStruct((B, T // CHUNK, G, K), jnp.float32),
            jax.ShapeDtypeStruct((B, T, H, CHUNK), self.operand),
        )
        return launch(
            weights.prepare, (q, k, log_alpha, weights.tables()), outputs, B * H * T // CHUNK, tile, self.capability,
            SCALE=self.scale, H=H, G=G, K=K, KEYS=tile.keys, LIMIT=self.limit, LIMBS=self.gate_limbs,
            PRECISION=self.precision,
        )  # fmt: skip

    def states(self, x, y, decay, boundary, reverse=False):
        """The states [B, H, T / 64, K, V] before each chunk, and the last; `reverse`: after each, and the first."""
        B, T, H, K, V, tile = self.B, self.T, self.H, self.K, self.V, self.tiles.states
        outputs = (
            jax.ShapeDtypeStruct((B, H, T // CHUNK, K, V), self.operand),
            jax.ShapeDtypeStruct((B, H, K, V), jnp.float32),
        )
        inputs = (x, y, decay, decay if boundary is None else boundary)
        return launch(
            walk.states, inputs, outputs, B * H * (K // tile.keys) * (V // tile.values), tile, self.capability,
            H=H, X_RATIO=H // x.shape[2], Y_RATIO=H // y.shape[2], DECAY_RATIO=H // self.G, K=K, V=V, KEYS=tile.keys,
            VALUES=tile.values, HAS_BOUNDARY=boundary is not None, REVERSE=reverse, PRECISION=self.precision,
        )  # fmt: skip

    def rows(self, x, states, p, y, dtype, transposed=False):
        B, T, H, K, V, tile = self.B, self.T, self.H, self.K, self.V, self.tiles.rows
        (o,) = launch(
            walk.rows, (x, states, p, y), (jax.ShapeDtypeStruct((B, T, H, V), dtype),),
            B * H * (T // CHUNK) * (V // tile.values), tile, self.capability,
            H=H, X_RATIO=H // x.shape[2], Y_RATIO=H // y.shape[2], K=K, V=V, KEYS=tile.keys, VALUES=tile.values,
            TRANSPOSED=transposed, PRECISION=self.precision,
        )  # fmt: skip
        return o

    def products(self, do, v):
        B, T, H, tile = self.B, self.T, self.H, self.tiles.products
        (dp,) = launch(
            gradients_kernels.products, (do, v), (jax.ShapeDtypeStruct((B, T, H, CHUNK), self.operand),),
            B * H * T // CHUNK, tile, self.capability,
            H=H, G=self.G, V=self.V, VALUES=tile.values, PRECISION=self.precision,
        )  # fmt: skip
        return dp

    def gradients(self, q, k, v, log_alpha, do, dp, states, d_states, documents, dtypes):
        B, T, H, K, tile = self.B, self.T, self.H, self.K, self.tiles.gradients
        inputs = (q, k, v, log_alpha, do, dp, states, d_states, q if documents is None else documents, weights.tables())
        return launch(
            gradients_kernels.gradients, inputs, [jax.ShapeDtypeStruct((B, T, H, K), dtype) for dtype in dtypes],
            B * H * (T // CHUNK) * (K // tile.keys), tile, self.capability,
            SCALE=self.scale, H=H, G=self.G, K=K, V=self.V, KEYS=tile.keys, VALUES=tile.values,
            PACKED=documents is not None, LIMIT=self.limit, GATE_LIMBS=self.gate_limbs, LIMBS=self.limbs,
            PRECISION=self.precision,
        )  # fmt: skip
