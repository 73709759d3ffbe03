"""The Hopper kernels in Pallas' interpreter, on CPU, with its race detector on: values, gradients, causality, bits.

A shape takes seconds to compile here and little to run again: SHAPES are few, and everything else varies over them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.selective_scan import mosaic_gpu
from kernels.selective_scan.mosaic_gpu import channel_sums

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter runs on CPU")

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)

# batch, length, channels, states, segments, state in and out
SHAPES = {
    "two blocks": (1, 40, 130, 16, True, True),
    "few": (2, 20, 5, 4, False, False),
}


@functools.cache
def compiled(with_state):
    def run(differentiable, segment_ids, d_y, d_state):
        def call(*arrays):
            *arrays, state = arrays
            options = {"initial_state": state, "segment_ids": segment_ids, "return_final_state": with_state}
            out = mosaic_gpu.selective_scan(*arrays, **options, interpret=INTERPRET)
            return out if with_state else (out,)

        outputs, vjp = jax.vjp(call, *differentiable)
        return *outputs, *vjp((d_y, d_state)[: len(outputs)])

    return jax.jit(run)


@pytest.fixture
def run(scan, capfd):
    """Outputs and gradients by the oracle's names; fails where the interpreter reports a race."""

    def run(inputs):
        with_state = inputs.initial_state is not None
        outputs = compiled(with_state)(inputs.differentiable, inputs.segment_ids, inputs.d_y, inputs.d_state)
        names = [name for name in scan.OUTPUTS if with_state or "state" not in name]
        outputs = {name: np.asarray(x) for name, x in zip(names, outputs, strict=False)}
        assert "RACE DETECTED" not in capfd.readouterr().out
        return outputs

    return run


def make_inputs(scan, shape, *arguments):
    return scan.make_inputs(scan.Case(*SHAPES[shape]), 0, *arguments)


@pytest.mark.parametrize(
    "shape, steps, segments, dtype",
    [
        ("two blocks", "mamba", "sorted", "bfloat16"),
        ("two blocks", "wild", "ids come back", "bfloat16"),
        ("few", "mamba", "one", "float32"),
    ],
)
def test_outputs_and_gradients(scan, run, shape, steps, segments, dtype):
    inputs = make_inputs(scan, shape, steps, segments, dtype)
    outputs = run(inputs)
    assert outputs["y"].dtype == inputs.x.dtype and outputs["dB"].dtype == inputs.B.dtype
    expected_of = inputs
    if inputs.initial_state is None:  # no final state either, and so no gradient of it
        expected_of = inputs.replace(d_state=jnp.zeros_like(inputs.d_state))
        outputs["final_state"] = scan.oracle(expected_of)["final_state"]
    scan.check(expected_of, outputs, dtype)


def test_future_and_other_segments_are_exactly_unseen(scan, run):
    inputs = make_inputs(scan, "two blocks", "mamba", "one", "bfloat16")
    tokens = np.arange(inputs.x.shape[1])
    chosen = (tokens >= 12) & (tokens <= 20)  # the second segment, up to a token in the middle of a tile
    inputs = inputs.replace(
        segment_ids=jnp.asarray(np.digitize(tokens, [12, 25])[None], jnp.int32),
        d_y=jnp.where(tokens[:, None] == 20, inputs.d_y, 0),
        d_state=jnp.zeros_like(inputs.d_state),
    )
    outputs = run(inputs)
    for name in ("dx", "ddt", "dB", "dC"):
        assert not np.any(outputs[name][:, ~chosen]), name
        assert np.any(outputs[name][:, chosen]), name
    assert not np.any(outputs["dinitial_state"])
    other = make_inputs(scan, "two blocks", "large", "one", "bfloat16")
    names, later = ("x", "dt", "B", "C"), tokens[:, None] > 20
    future = {name: jnp.where(later, getattr(other, name), getattr(inputs, name)) for name in names}
    np.testing.assert_array_equal(outputs["y"][:, :21], run(inputs.replace(**future))["y"][:, :21])


def test_same_bits_twice(scan, run):
    inputs = make_inputs(scan, "two blocks", "wild", "sorted", "bfloat16")
    first, second = run(inputs), run(inputs)
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_sums_go_to_their_tokens():
    """What the kernel leaves per tile of 16 tokens, [row of a pair, pair], as sums of each kind of each token."""
    tile, token, kind, state = np.meshgrid(range(3), range(16), range(2), range(16), indexing="ij")
    want = tile * 10000 + token * 100 + kind * 50 + state
    totals = np.zeros((3, channel_sums.ROWS, channel_sums.COLUMNS))
    rows = (token % channel_sums.TOKENS * 2 + kind) * 16 + state
    totals[tile, rows, token // channel_sums.TOKENS] = want
    got = channel_sums.of_tokens(jnp.asarray(totals))
    for kind in range(2):
        np.testing.assert_array_equal(got[kind], want.reshape(48, 2, 16)[:, kind])


MISTAKES = {
    "float16": ({"dt": (4, jnp.float16)}, "gpu", "dt is float16"),
    "states": ({"A": (17, jnp.float32)}, "gpu", "A has N = 17"),
    "platform": ({}, "cpu", "x is on platform 'cpu'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_says_what_it_cannot_run(mistake):
    changes, platform, message = MISTAKES[mistake]
    arrays = dict.fromkeys(("x", "dt", "A", "B", "C", "D"), (16, jnp.bfloat16)) | changes
    arrays = [jax.ShapeDtypeStruct((8, width), dtype) for width, dtype in arrays.values()]
    options = {"initial_state": None, "segment_ids": None, "return_final_state": False}
    reason = mosaic_gpu.unsupported(*arrays, **options, platform=platform)
    assert reason.startswith(message) and "\n" not in reason
