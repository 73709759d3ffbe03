"""The Hopper kernels in Pallas' interpreter, on CPU, with its race detector on: values, gradients, causality, bits.

A shape takes seconds to compile here and little to run again: SHAPES are few, and everything else varies over them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.gla import mosaic_gpu
from kernels.gla.mosaic_gpu import forward, forward_tiers, operator, wide_operator
from kernels.gla.mosaic_gpu.pieces import Cut

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter runs on CPU"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),  # -inf gates, on the way to tier 3
]

INTERPRET = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")

# batch, length, heads, groups, K, V, segments, state in and out, dtype
SHAPES = {
    "grouped": (1, 100, 2, 1, 64, 64, True, True, "bfloat16"),
    "two warpgroups": (1, 65, 1, 1, 128, 128, False, False, "bfloat16"),
    "padded widths, two value blocks": (1, 70, 1, 1, 96, 144, True, True, "bfloat16"),
    "two key blocks": (1, 66, 1, 1, 256, 64, False, True, "bfloat16"),
    "float16": (2, 64, 1, 1, 48, 80, True, False, "float16"),
    "many chunks of a wide head": (1, 330, 1, 1, 128, 256, False, False, "bfloat16"),
    "two value blocks of a wide head": (1, 130, 1, 1, 256, 512, False, False, "bfloat16"),
    "eight chunks": (1, 500, 1, 1, 64, 64, True, True, "bfloat16"),
    "token": (1, 1, 1, 1, 16, 16, False, True, "bfloat16"),
}

# Beside the gates of the shared suite: "fast" fits tier 2's blocks of 16 rows and not tier 1's chunk.
MORE_GATES = {"fast": lambda x: 4 * jax.nn.log_sigmoid(x), "steepest": lambda x: jnp.full_like(x, -60)}

LEAK = pytest.mark.xfail(
    strict=True, reason="tier 1's anchor is the chunk's middle row: gates between i and it move the last bits of o_i"
)

CASES = [
    ("grouped", "mild", "sorted"),
    ("grouped", "fast", "ids come back"),
    ("grouped", "wild", "sorted"),
    ("grouped", "steepest", "one"),
    ("grouped", "none pass", "each token"),
    ("two warpgroups", "unscaled", None),
    ("two warpgroups", "fast", None),
    ("two warpgroups", "resets", None),
    ("padded widths, two value blocks", "mild", "one"),
    ("padded widths, two value blocks", "strong", "sorted"),
    ("two key blocks", "mild", None),
    ("two key blocks", "wild", None),
    ("many chunks of a wide head", "mild", None),
    ("many chunks of a wide head", "resets", None),
    ("two value blocks of a wide head", "mild", None),
    ("float16", "unscaled", "sorted"),
    ("token", "mild", None),
]


def make_inputs(gla, shape, gates="mild", segments=None, seed=0):
    *sizes, dtype = SHAPES[shape]
    inputs = gla.make_inputs(gla.Case(*sizes), seed, gates if gates in gla.GATES else "mild", segments, dtype)
    if gates in MORE_GATES:
        x = jax.random.normal(jax.random.key(seed), inputs.log_alpha.shape)
        inputs = inputs.replace(log_alpha=MORE_GATES[gates](x).astype(dtype))
    return inputs


@functools.cache
def compiled(with_state, pieces=1):
    """`pieces` only keeps apart what is traced with other tiles."""

    def run(differentiable, segment_ids, d_o, d_state):
        def call(q, k, v, log_alpha, initial_state):
            out = mosaic_gpu.gated_linear_attention(
                q,
                k,
                v,
                log_alpha,
                scale=q.shape[-1] ** -0.5,
                initial_state=initial_state,
                segment_ids=segment_ids,
                return_final_state=with_state,
                interpret=INTERPRET,
            )
            return out if with_state else (out,)

        outputs, vjp = jax.vjp(call, *differentiable)
        return *outputs, *vjp((d_o, d_state)[: len(outputs)])

    return jax.jit(run)


@pytest.fixture
def run(gla, capfd):
    """Outputs and gradients by the oracle's names; fails where the interpreter reports a race."""

    def run(inputs, pieces=1):
        with_state = inputs.initial_state is not None
        outputs = compiled(with_state, pieces)(inputs.differentiable, inputs.segment_ids, inputs.d_o, inputs.d_state)
        names = [name for name in gla.OUTPUTS if with_state or "state" not in name]
        outputs = {name: np.asarray(x) for name, x in zip(names, outputs, strict=False)}
        assert "RACE DETECTED" not in capfd.readouterr().out
        return outputs

    return run


@pytest.mark.parametrize("shape, gates, segments", CASES)
def test_outputs_and_gradients(gla, run, shape, gates, segments):
    inputs = make_inputs(gla, shape, gates, segments)
    outputs = run(inputs)
    assert outputs["o"].dtype == inputs.v.dtype and outputs["dlog_alpha"].dtype == inputs.log_alpha.dtype
    # float16 is rounded to bfloat16 on the way in: held to the bounds from there.
    rounded = {name: getattr(inputs, name).astype("bfloat16") for name in ("q", "k", "v", "log_alpha", "d_o")}
    expected_of = inputs.replace(**rounded)
    if inputs.initial_state is None:  # no final state either, and so no gradient of it
        expected_of = expected_of.replace(d_state=jnp.zeros_like(inputs.d_state))
        outputs["final_state"] = gla.oracle(expected_of)["final_state"]
    gla.check(expected_of, outputs, "bfloat16")


@pytest.mark.parametrize(
    "shape, cut, gates, segments",
    [
        ("grouped", Cut(2), "mild", "one"),
        ("grouped", Cut(2), "wild", "sorted"),
        ("eight chunks", Cut(2, shorter=2), "wild", "sorted"),
    ],
)
def test_sequence_in_two_pieces(gla, run, monkeypatch, shape, cut, gates, segments):
    """As few heads with long sequences are walked."""
    for name in ("forward_tiles", "backward_tiles"):
        tiles = getattr(operator, name)
        in_two = lambda *shapes, tiles=tiles: dataclasses.replace(tiles(*shapes), cut=cut)  # noqa: E731
        monkeypatch.setattr(operator, name, in_two)
    inputs = make_inputs(gla, shape, gates, segments)
    gla.check(inputs, run(inputs, pieces=2), "bfloat16")


def test_sequence_of_a_wide_head_in_two_pieces(gla, run, monkeypatch):
    monkeypatch.setattr(wide_operator, "wide_pieces", lambda *shapes: 2)
    inputs = make_inputs(gla, "padded widths, two value blocks", "wild", "sorted")
    gla.check(inputs, run(inputs, pieces=2), "bfloat16")


@pytest.mark.parametrize("i", [10, 70, 200])
def test_gradients_of_the_future_of_a_wide_head_are_zero(gla, run, i):
    inputs = make_inputs(gla, "many chunks of a wide head", "mild")
    d_o = jnp.where(np.arange(330)[:, None, None] == i, inputs.d_o, 0)
    outputs = run(inputs.replace(d_o=d_o))
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][:, i + 1 :]), name


@pytest.mark.parametrize("gates, i", [("mild", 10), ("mild", 37), ("fast", 70), ("wild", 10)])
def test_gradients_of_the_future_are_zero(gla, run, gates, i):
    inputs = make_inputs(gla, "grouped", gates, "one")
    d_o = jnp.where(np.arange(100)[:, None, None] == i, inputs.d_o, 0)
    outputs = run(inputs.replace(d_o=d_o, d_state=jnp.zeros_like(inputs.d_state)))
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][:, i + 1 :]), name
        assert np.any(outputs[name][:, : i + 1]), name


@pytest.mark.parametrize("i", [pytest.param(10, marks=LEAK), 37, 63])
def test_outputs_keep_their_bits_when_the_future_changes(gla, run, i):
    inputs, other = (make_inputs(gla, "grouped", "mild", "one", seed) for seed in (0, 1))
    tokens = np.arange(100)[:, None, None]
    names = ("q", "k", "v", "log_alpha")
    future = {name: jnp.where(tokens > i, getattr(other, name), getattr(inputs, name)) for name in names}
    outputs, changed = run(inputs), run(inputs.replace(**future))
    np.testing.assert_array_equal(outputs["o"][:, : i + 1], changed["o"][:, : i + 1])


@pytest.mark.parametrize("gates", ["mild", "wild"])
def test_segments_are_exactly_apart(gla, run, gates):
    inputs = make_inputs(gla, "grouped", gates, "sorted")
    ids = jnp.asarray(np.digitize(np.arange(100), [20, 40, 70])[None], jnp.int32)
    chosen = np.asarray(ids) == 2  # tokens 40 to 69: across the boundary of two chunks
    d_o = jnp.where(chosen[:, :, None, None], inputs.d_o, 0)
    inputs = inputs.replace(segment_ids=ids, d_o=d_o, d_state=jnp.zeros_like(inputs.d_state))
    outputs = run(inputs)
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][~chosen]), name
        assert np.any(outputs[name][chosen]), name
    assert not np.any(outputs["dinitial_state"])


def test_gates_that_start_segments_have_no_gradient(gla, run):
    inputs = make_inputs(gla, "grouped", "mild", "sorted")
    ids = np.asarray(inputs.segment_ids)
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    assert np.any(starts)
    assert not np.any(run(inputs)["dlog_alpha"][starts])


def test_same_bits_twice(gla, run):
    inputs = make_inputs(gla, "two warpgroups", "wild")
    first, second = run(inputs), run(inputs)
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_the_detector_sees_a_race(gla, monkeypatch, capfd):
    """Without the meeting points of its two warpgroups the forward walk races: what the other tests would report."""
    for module in (forward, forward_tiers):
        for name in ("meet", "settle"):
            monkeypatch.setattr(module, name, lambda barrier=None: None)
    inputs = make_inputs(gla, "two warpgroups")
    call = functools.partial(mosaic_gpu.gated_linear_attention, scale=1.0, interpret=INTERPRET)
    jax.block_until_ready(jax.jit(call)(inputs.q, inputs.k, inputs.v, inputs.log_alpha))
    assert "RACE DETECTED" in capfd.readouterr().out


MISTAKES = {
    "float32": ({"k": (64, jnp.float32)}, "gpu", "k is float32"),
    "wide keys": ({"q": (257, jnp.bfloat16), "k": (257, jnp.bfloat16)}, "gpu", "q has K = 257"),
    "platform": ({}, "cpu", "q is on platform 'cpu'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_says_what_it_cannot_run(mistake):
    changes, platform, message = MISTAKES[mistake]
    arrays = dict.fromkeys(("q", "k", "v", "log_alpha"), (64, jnp.bfloat16)) | changes
    arrays = [jax.ShapeDtypeStruct((1, 8, 1, width), dtype) for width, dtype in arrays.values()]
    options = {"initial_state": None, "segment_ids": None, "return_final_state": False}
    reason = mosaic_gpu.unsupported(*arrays, **options, platform=platform)
    assert reason.startswith(message) and "\n" not in reason
