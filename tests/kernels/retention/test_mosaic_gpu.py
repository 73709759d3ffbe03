"""The Hopper kernel in Pallas' interpreter, on CPU, with its race detector on: values, gradients, causality, bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from against_oracle import rms
from kernels.retention import choose, mosaic_gpu

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter runs on CPU")

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)

# batch, length, heads, K, V, segments, state in and out, fixed decays
SHAPES = {
    "three spans": (1, 300, 1, 64, 64, True, True, False),
    "two warpgroups, padded widths": (1, 70, 1, 96, 100, False, True, True),
}


@functools.cache
def compiled(scale):
    def run(differentiable, segment_ids, d_o, d_state):
        def call(q, k, v, log_gamma, state):
            options = {"initial_state": state, "segment_ids": segment_ids, "return_final_state": True}
            log_gamma = jnp.broadcast_to(log_gamma, q.shape[:3])
            return mosaic_gpu.retention(q, k, v, log_gamma, scale=scale, **options, interpret=INTERPRET)

        outputs, vjp = jax.vjp(call, *differentiable)
        return *outputs, *vjp((d_o, d_state))

    return jax.jit(run)


@pytest.fixture
def run(suite, capfd):
    """Outputs and gradients by the oracle's names; fails where the interpreter reports a race."""

    def run(inputs):
        call = compiled(inputs.q.shape[-1] ** -0.5)
        outputs = call(inputs.differentiable, inputs.segment_ids, inputs.d_o, inputs.d_state)
        assert "RACE DETECTED" not in capfd.readouterr().out
        return {name: np.asarray(x) for name, x in zip(suite.OUTPUTS, outputs, strict=True)}

    return run


def make_inputs(suite, shape, gates, segments):
    return suite.make_inputs(suite.Case(*SHAPES[shape]), 0, gates, segments, "bfloat16")


@pytest.mark.parametrize(
    "shape, gates, segments",
    [
        ("three spans", "mild", "sorted"),
        ("three spans", "wild", "ids come back"),
        ("two warpgroups, padded widths", "retnet", "one"),
    ],
)
def test_outputs_and_gradients(suite, run, shape, gates, segments):
    inputs = make_inputs(suite, shape, gates, segments)
    suite.check(inputs, run(inputs), "bfloat16")


def test_fixed_decays_take_no_sums_for_their_gradient(suite):
    """Where log_gamma has no gradient, that of q, k and v is the same, and neither walk adds anything up for it."""
    inputs = make_inputs(suite, "two warpgroups, padded widths", "retnet", "one")
    q, k, v, log_gamma, _ = inputs.differentiable
    log_gamma = jnp.broadcast_to(log_gamma, q.shape[:3])

    def loss(q, k, v, log_gamma):
        o = mosaic_gpu.retention(q, k, v, log_gamma, scale=q.shape[-1] ** -0.5, interpret=INTERPRET)
        return jnp.sum(o.astype(jnp.float32) * inputs.d_o.astype(jnp.float32))

    fixed, learned = jax.grad(loss, (0, 1, 2)), jax.grad(loss, (0, 1, 2, 3))
    sums = ["f32[1,2,1,1,128]" in str(jax.make_jaxpr(run)(q, k, v, log_gamma)) for run in (fixed, learned)]
    assert sums == [False, True]
    expected = jax.jit(learned)(q, k, v, log_gamma)
    for one, other in zip(jax.jit(fixed)(q, k, v, log_gamma), expected[:3], strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert rms(one - other) < 3e-3 * rms(other)


def test_future_and_other_segments_are_exactly_unseen(suite, run):
    inputs = make_inputs(suite, "three spans", "mild", "one")
    tokens = np.arange(300)
    chosen = (tokens >= 100) & (tokens <= 140)  # the second segment, up to a token in the middle of a chunk
    inputs = inputs.replace(
        segment_ids=jnp.asarray(np.digitize(tokens, [100, 200])[None], jnp.int32),
        d_o=jnp.where(tokens[:, None, None] == 140, inputs.d_o, 0),
        d_state=jnp.zeros_like(inputs.d_state),
    )
    outputs = run(inputs)
    for name in ("dq", "dk", "dv", "dlog_gamma"):
        assert not np.any(outputs[name][:, ~chosen]), name
        assert np.any(outputs[name][:, chosen]), name
    assert not np.any(outputs["dinitial_state"]) and not np.any(outputs["dlog_gamma"][:, 100])
    again = run(inputs)
    for name, x in outputs.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)


@pytest.mark.parametrize(
    "dtype, platform, message", [("float32", "gpu", "q is float32"), ("bfloat16", "cpu", "q is on")]
)
def test_says_what_it_cannot_run(dtype, platform, message):
    arrays = [jax.ShapeDtypeStruct((1, 8, 1, 16), dtype)] * 3 + [jax.ShapeDtypeStruct((1, 8, 1), jnp.float32)]
    options = {"initial_state": None, "segment_ids": None, "return_final_state": False}
    assert mosaic_gpu.unsupported(*arrays, **options, platform=platform).startswith(message)


@pytest.mark.parametrize("dtype, chosen", [("bfloat16", "mosaic_gpu"), ("float32", "xla")])
def test_choice_on_hopper(monkeypatch, dtype, chosen):
    monkeypatch.setattr("kernels.dispatch.platform_of", lambda x: "gpu")
    monkeypatch.setattr("kernels.dispatch.compute_capability", lambda: "9.0")
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, 256), dtype)] * 3 + [jax.ShapeDtypeStruct((2,), jnp.float32)]
    assert choose(*arrays).implementation == chosen
