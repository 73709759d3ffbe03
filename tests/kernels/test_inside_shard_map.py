"""Operators in a shard_map that checks what varies over the mesh, as it does unless told otherwise.

They begin with no state, and some weights are shared by all devices, whose gradients shard_map adds up.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import retention, selective_scan, short_convolution, softmax_cross_entropy

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: JAX_PLATFORMS=cpu with virtual ones")

ROWS, ALL = P("x"), P()
CASES = {
    "retention": (retention, [(2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 6), (3,)], [ROWS, ROWS, ROWS, ALL]),
    "selective_scan": (
        selective_scan,
        [(2, 5, 4), (2, 5, 4), (4, 3), (2, 5, 3), (2, 5, 3), (4,)],
        [ROWS, ROWS, ALL, ROWS, ROWS, ALL],
    ),
    "short_convolution": (short_convolution, [(2, 5, 4), (4, 3)], [ROWS, ALL]),
    "softmax_cross_entropy": (
        lambda hidden, unembedding, one_hot: softmax_cross_entropy(hidden, unembedding, jnp.argmax(one_hot, 1)),
        [(6, 4), (4, 11), (6, 11)],
        [ROWS, ALL, ROWS],
    ),
}
IMPLEMENTATIONS = [(name, None) for name in CASES] + [(name, "reference") for name in ("retention", "selective_scan")]


@pytest.mark.parametrize("name, implementation", IMPLEMENTATIONS)
def test_gradients(name: str, implementation: str | None):
    operator, shapes, specs = CASES[name]
    options = {} if implementation is None else {"implementation": implementation}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [-jnp.abs(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes, strict=True)]

    def call(*arrays):
        return operator(*arrays, **options)

    def gradients(f):
        every = tuple(range(len(arrays)))
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=every))(*arrays)

    sharded = jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=ROWS)
    for got, want in zip(gradients(sharded), gradients(call), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
