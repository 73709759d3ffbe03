"""The Triton kernels in Triton's interpreter, on a CPU: values, gradients, causality, same bits. (On a GPU the shared
suite runs them: conftest.py.)

The interpreter takes numpy arrays by their address. It has no products or rounding of bfloat16, so those are given to
it here; and it cannot run two kernels at once.
"""

import importlib.util
import os
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels.gla.triton import operator

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax_triton comes with the triton extra"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter would take the place of the GPU"),
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ONE_AT_A_TIME = threading.Lock()


class Pointer:
    """What the interpreter asks of a tensor, for a numpy array."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return Pointer(self.array)

    untyped_storage, size, stride = cpu, cpu, cpu
    storage_offset = set_ = copy_ = lambda self, *_: None


@pytest.fixture
def interpreted(monkeypatch):
    """Runs what `launch` is given in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined: no other test may have imported them
    import triton.language as tl
    from triton.runtime import interpreter

    from kernels.gla.triton import launch

    def numpy_dtype(dtype):
        return BFLOAT16 if dtype == tl.bfloat16 else interpreter._get_np_dtype(dtype)

    def cast(_, x, dtype):
        source, target = numpy_dtype(x.dtype.scalar), numpy_dtype(dtype.scalar)
        data = (x.data.view(BFLOAT16) if source == BFLOAT16 else x.data).astype(target)
        return interpreter.TensorHandle(data.view(np.uint16) if target == BFLOAT16 else data, dtype.scalar)

    def dot(_, a, b, d, *options):
        a, b = (cast(_, x, tl.float32).data for x in (a, b))
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6 with new numpy

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)

    def run(kernel, inputs, outputs, blocks, tile, capability, **constants):
        def callback(*arrays):
            arrays = [np.ascontiguousarray(x) for x in arrays]
            results = tuple(np.full(x.shape, np.nan, x.dtype) for x in outputs)
            with ONE_AT_A_TIME:
                length = arrays[0].shape[1]
                kernel[(blocks,)](*map(Pointer, arrays), length, *map(Pointer, results), **constants)
            return results

        return jax.pure_callback(callback, tuple(outputs), *inputs)

    monkeypatch.setattr(launch, "launch", run)
    monkeypatch.setattr(operator, "_capability", lambda: 80)
    monkeypatch.setattr(operator, "shard_over_batch_and_heads", lambda fn, *axes: fn)


def run(gla, inputs):
    """Outputs and gradients by the names of the oracle."""

    def call(q, k, v, log_alpha, state):
        return operator.gated_linear_attention(
            q, k, v, log_alpha, scale=q.shape[-1] ** -0.5, initial_state=state, segment_ids=inputs.segment_ids,
            return_final_state=True,
        )  # fmt: skip

    outputs, vjp = jax.vjp(call, *inputs.differentiable)
    outputs = (*outputs, *vjp((inputs.d_o, inputs.d_state)))
    return {name: np.asarray(x) for name, x in zip(gla.OUTPUTS, outputs, strict=True) if x is not None}


# Gates that take no level (mild), two (fast), all (wild, strong, resets): float32 always takes all.
RUNS = [
    ("small", "bfloat16", "mild", "one"),
    ("small", "bfloat16", "mild", "sorted"),
    ("small", "bfloat16", "fast", "one"),
    ("small", "bfloat16", "wild", "ids come back"),
    ("small", "bfloat16", "resets", "each token"),
    ("small", "float32", "mild", "sorted"),
    ("small", "float32", "wild", "one"),
    ("small", "float16", "strong", "sorted"),
    ("blocks", "bfloat16", "wild", "sorted"),
    ("blocks", "bfloat16", "none pass", "sorted"),
    ("token", "float32", "mild", "one"),
    ("tiny", "bfloat16", "wild", "sorted"),
]


@pytest.fixture(autouse=True)
def more(gla, monkeypatch):
    monkeypatch.setitem(gla.GATES, "fast", lambda rng, shape: -rng.exponential(size=shape) * 2)
    blocks = gla.Case(1, 70, 1, 1, 100, 130, segments=True, state=True)  # several blocks of keys and of values
    monkeypatch.setitem(gla.CASES, "blocks", blocks)
    monkeypatch.setitem(gla.CASES, "small", gla.Case(1, 130, 2, 1, 8, 16, segments=True, state=True))


@pytest.mark.parametrize("case, number, gates, segments", RUNS)
def test_outputs_and_gradients(gla, interpreted, case, number, gates, segments):
    inputs = gla.make_inputs(gla.CASES[case], gates=gates, segments=segments, dtype=number)
    outputs = run(gla, inputs)
    assert outputs["o"].dtype == inputs.v.dtype and outputs["dlog_alpha"].dtype == inputs.log_alpha.dtype
    gla.check(inputs, outputs, number)


def test_bfloat16_with_float32_gates(gla, interpreted):
    inputs = gla.make_inputs(gla.CASES["small"], gates="wild", dtype="bfloat16", gate_dtype="float32")
    gla.check(inputs, run(gla, inputs), "bfloat16")


FUTURE = [("bfloat16", "mild", 70), ("bfloat16", "wild", 10), ("float32", "mild", 63)]


@pytest.mark.parametrize("number, gates, i", FUTURE)
def test_the_future_is_exactly_unseen(gla, interpreted, number, gates, i):
    case = gla.CASES["small"]
    inputs, other = (gla.make_inputs(case, seed, gates, "one", number) for seed in (0, 1))
    tokens = np.arange(case.length)[:, None, None]
    d_o = jnp.where(tokens == i, inputs.d_o, jnp.zeros((), number))
    inputs = inputs.replace(d_o=d_o, d_state=jnp.zeros_like(inputs.d_state))
    outputs = run(gla, inputs)
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][:, i + 1 :]), name
        assert np.any(outputs[name][:, : i + 1]), name
    if number == "float32":  # in bfloat16 a bounded block has its anchor in its middle: last bits before that can move
        names = ("q", "k", "v", "log_alpha")
        future = {name: jnp.where(tokens > i, getattr(other, name), getattr(inputs, name)) for name in names}
        changed = run(gla, inputs.replace(**future))
        np.testing.assert_array_equal(outputs["o"][:, : i + 1], changed["o"][:, : i + 1])


@pytest.mark.parametrize("gates", ["mild", "wild"])
def test_segments_are_exactly_apart(gla, interpreted, gates):
    case = gla.CASES["small"]
    inputs = gla.make_inputs(case, gates=gates, dtype="bfloat16")
    ids = np.digitize(np.arange(case.length), [20, 40, 70, 100])
    chosen = ids == 2  # tokens 40 to 69: across the boundary of two chunks
    d_o = jnp.where(chosen[:, None, None], inputs.d_o, jnp.zeros((), "bfloat16"))
    ids = jnp.asarray(np.tile(ids, (case.batch, 1)), jnp.int32)
    outputs = run(gla, inputs.replace(segment_ids=ids, d_o=d_o, d_state=jnp.zeros_like(inputs.d_state)))
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][:, ~chosen]), name
        assert np.any(outputs[name][:, chosen]), name
    assert not np.any(outputs["dlog_alpha"][:, [20, 40, 70, 100]])
    assert not np.any(outputs["dinitial_state"])


MISTAKES = {
    "float64": ({"k": (64, jnp.float64)}, "gpu", "8.0", "k is float64"),
    "wide keys": ({"q": (257, jnp.bfloat16)}, "gpu", "8.0", "q has 257 channels per head"),
    "wide values": ({"v": (513, jnp.bfloat16)}, "gpu", "8.0", "v has 513 channels per head"),
    "platform": ({}, "cpu", None, "q is on platform 'cpu'"),
    "old": ({}, "gpu", "7.5", "the GPU has compute capability 7.5"),
    "another maker's": ({}, "gpu", "gfx90a", "the GPU has compute capability gfx90a"),
    "the extra": ({}, "gpu", "8.6", "jax_triton is not installed"),
}


def unsupported(monkeypatch, capability, platform="gpu", **changes):
    monkeypatch.setattr(operator, "_device_capability", lambda: capability)
    arrays = dict.fromkeys(("q", "k", "v", "log_alpha"), (64, jnp.bfloat16)) | changes
    with jax.enable_x64():
        arrays = [jax.ShapeDtypeStruct((1, 8, 1, width), dtype) for width, dtype in arrays.values()]
    options = {"initial_state": None, "segment_ids": None, "return_final_state": False}
    return operator.unsupported(*arrays, **options, platform=platform)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_says_what_it_cannot_run(monkeypatch, mistake):
    changes, platform, capability, message = MISTAKES[mistake]
    if mistake == "the extra":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = unsupported(monkeypatch, capability, platform, **changes)
    assert reason.startswith(message) and "\n" not in reason


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_runs_from_ampere_on(monkeypatch, capability):
    assert unsupported(monkeypatch, capability) is None
    assert unsupported(monkeypatch, capability, v=(512, jnp.float32), log_alpha=(64, jnp.float16)) is None


def test_choice_takes_it_after_the_hopper_kernels(monkeypatch):
    from kernels import dispatch
    from kernels.gla import api

    monkeypatch.setattr(operator, "_device_capability", lambda: "8.0")
    monkeypatch.setattr(dispatch, "platform_of", lambda x: "gpu")
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float32)
    choice = api.choose(x, x, x, x)
    assert choice.implementation == "triton"
    assert list(choice.passed_over) == ["mosaic_gpu"] and "q is float32" in choice.passed_over["mosaic_gpu"]


def test_jax_triton_is_imported_only_when_used():
    import subprocess
    import sys

    code = "import sys, kernels.gla.triton; assert not {'triton', 'jax_triton'} & set(sys.modules)"
    root = os.path.dirname(os.path.abspath(operator.__file__)) + "/../../.."
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices: JAX_PLATFORMS=cpu with eight virtual ones")
def test_kernels_are_launched_for_a_shard(monkeypatch):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from kernels.gla.triton import launch

    seen = []

    def stand_in(kernel, inputs, outputs, blocks, tile, capability, **constants):
        seen.append((inputs[0].shape[0], constants["H"]))
        return [jnp.zeros(x.shape, x.dtype) + inputs[0].ravel()[0].astype(x.dtype) for x in outputs]

    monkeypatch.setattr(launch, "launch", stand_in)
    monkeypatch.setattr(operator, "_capability", lambda: 80)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    q, k = (jax.ShapeDtypeStruct((8, 64, heads, 16), jnp.float32, sharding=sharding) for heads in (8, 4))
    options = {"scale": 1.0, "initial_state": None, "segment_ids": None, "return_final_state": False}
    loss = lambda *x: jnp.sum(operator.gated_linear_attention(*x, **options))  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, k, k).compile()
    assert (2, 4) in seen  # and, where the whole call is abstractly evaluated, (8, 8)
    assert set(seen) <= {(2, 4), (8, 8)}
    assert not any(f" {name}(" in compiled.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))
