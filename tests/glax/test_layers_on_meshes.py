"""Token mixers under a mesh: each device runs the operator on its share, and layers share its kernels."""

import dataclasses
import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from glax.inference import generate
from glax.layers.sequence_parallel import linear_attention, state_space
from glax.models import PRESETS, LanguageModel
from glax.training import MeshConfig
from glax.training.sharding import batch_sharding, make_mesh, use_mesh
from kernels import gated_linear_attention, retention

TARGET = Path(__file__).parents[1] / "kernels" / "gla" / "h200.txtpb"
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
T, K, V = 8, 4, 4


def normals(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def attention(operator: Callable, rows: int, heads: int, groups: int, decay: tuple[int, ...]):
    """``run`` and ``arrays``: ``run(operator)(*arrays)`` is the output, the last state, and all gradients."""
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.2, (rows, T)), 1, dtype=jnp.int32)
    shapes = (rows, T, heads, K), (rows, T, groups, K), (rows, T, groups, V), decay, (rows, heads, K, V)
    q, k, v, gates, state = normals(*shapes)

    def run(operator):
        def call(*arrays):
            options = {"segment_ids": documents, "implementation": "xla"}
            return linear_attention(operator, *arrays[:-1], state=arrays[-1], **options)

        return jax.jit(lambda *arrays: outputs_and_gradients(call, *arrays))

    return run, (q, k, v, jax.nn.log_sigmoid(gates), state)


def outputs_and_gradients(call: Callable, *arrays: jax.Array):
    out, vjp = jax.vjp(call, *arrays)
    return out, vjp(jax.tree.map(jnp.cos, out))


def assert_close(got, want):
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def under_rules():
    return use_mesh(make_mesh(MESH))


def under_no_rules():
    return jax.set_mesh(make_mesh(MESH))


# The operator; rows, heads, groups of heads and decays; the mesh; rows, heads and groups that a call of it has then.
CASES = {
    "gates": (gated_linear_attention, (4, 4, 2, (4, T, 2, K)), under_rules, (1, 2, 1)),
    "decays of tokens": (retention, (4, 2, 2, (4, T, 2)), under_rules, (1, 1, 1)),
    "decays of heads": (retention, (4, 2, 2, (2,)), under_rules, (1, 1, 1)),
    # The rest is not cut into equal shares: one call, which the compiler partitions.
    "3 rows": (gated_linear_attention, (3, 2, 2, (3, T, 2, K)), under_rules, (3, 2, 2)),
    "3 heads": (retention, (4, 3, 3, (3,)), under_rules, (4, 3, 3)),
    "1 group": (gated_linear_attention, (4, 2, 1, (4, T, 1, K)), under_rules, (4, 2, 1)),
    "axes without a rule": (gated_linear_attention, (4, 2, 2, (4, T, 2, K)), under_no_rules, (4, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_device_has_its_rows_and_heads(case: str):
    operator, sizes, mesh, share = CASES[case]
    run, arrays = attention(operator, *sizes)
    seen = set()

    def spied(q, k, *rest, **options):
        seen.add((q.shape[0], q.shape[2], k.shape[2]))
        return operator(q, k, *rest, **options)

    want = run(operator)(*arrays)
    with mesh():
        got = run(spied)(*arrays)
    assert seen == {share}
    assert_close(got, want)


def test_each_device_has_its_channels():
    """Gradients of what all rows share, rates and skips, are sums over rows; of B and C over channels."""
    E, N = 6, 3
    x, dt, A, B, C, D, state = normals((4, T, E), (4, T, E), (E, N), (4, T, N), (4, T, N), (E,), (4, E, N))
    arrays = x, jax.nn.softplus(dt), -jnp.exp(A), B, C, D, state

    def call(*arrays):
        return state_space(*arrays[:-1], state=arrays[-1], segment_ids=None, implementation="xla")

    def run(*arrays):
        return outputs_and_gradients(call, *arrays)

    want = jax.jit(run)(*arrays)
    with under_rules():
        lowered = jax.jit(run).lower(*arrays)
        got = lowered.compile()(*arrays)
    assert f"tensor<1x{T}x{E // 2}xf32>" in lowered.as_text()
    assert_close(got, want)


@pytest.mark.parametrize(("preset", "rows"), [("gla-tiny", 1), ("gla-tiny", 4), ("mamba-tiny", 4)])
def test_generation_is_one_devices(preset: str, rows: int):
    """The batch of a prompt may be cut into shares, and may not."""
    config = dataclasses.replace(PRESETS[preset], compute_dtype="float32", initializer_range=0.2, scan_layers=True)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    prompts = jax.random.randint(jax.random.key(1), (rows, 9), 0, config.vocab_size)
    lengths = jnp.arange(9, 9 - rows, -1)
    want = generate(model, prompts, lengths, max_new_tokens=4, temperature=0)
    with under_rules():
        np.testing.assert_array_equal(generate(model, prompts, lengths, max_new_tokens=4, temperature=0), want)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the CUDA compiler is not installed: glax[cuda]"
)
@pytest.mark.parametrize(
    ("mixer", "mesh"),
    [("gla", MeshConfig(fsdp=2, tensor=2)), ("retnet", MeshConfig(sequence=4)), ("mamba", MeshConfig(data=4))],
    ids=["gla", "retnet", "mamba"],
)
def test_kernels_are_lowered_once_for_all_layers(mixer: str, mesh: MeshConfig):
    """On four H200s, which need not be here: a layer more is a call more, of what has the kernels, forward and back."""
    target = {"target_config": TARGET.read_text(), "topology": "1x4x1"}
    mesh = make_mesh(mesh, topologies.get_topology_desc(platform="cuda", **target).devices)
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))

    def lowered(layers: int) -> tuple[Counter, int]:
        """Calls of kernels, and of blocks, in the text of the program."""
        sizes = {"hidden_size": 128, "num_layers": layers, "expand_k": 1.0, "expand_v": 1.0, "mlp_size": 64}
        config = dataclasses.replace(PRESETS[f"{mixer}-tiny"], **sizes, scan_layers=True, compute_dtype="bfloat16")
        graph, params = nnx.split(jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
        place = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)

        def loss(params, tokens):
            return jnp.sum(nnx.merge(graph, params).hidden(tokens).astype(jnp.float32))

        with use_mesh(mesh):
            text = jax.jit(jax.grad(loss)).lower(params, tokens).as_text()
        return Counter(re.findall(r"custom_call @(mosaic\w+)", text)), len(re.findall(r"call @_run\w*\(", text))

    kernels, calls = lowered(2)
    assert kernels.total() > 1
    assert (calls, lowered(3)) == (4, (kernels, 6))
