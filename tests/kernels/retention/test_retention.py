"""The suite every implementation passes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import against_oracle
from against_oracle import few_examples, outputs_and_gradients, rms
from kernels import gated_linear_attention, retention, retention_step
from kernels.retention import choose

TOKENS = ("dq", "dk", "dv", "dlog_gamma")
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)\(")


def run(suite, implementation, inputs):
    return against_oracle.run(retention, implementation, suite.OUTPUTS, inputs)


@few_examples(max_examples=20)
@given(data=st.data())
def test_outputs_and_gradients(suite, implementation, data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    case = suite.CASES[data.draw(st.sampled_from(sorted(suite.CASES)))]
    inputs = suite.make_inputs(
        case,
        seed=data.draw(st.integers(0, 2**16)),
        gates=data.draw(st.sampled_from(sorted(suite.GATES))),
        segments=data.draw(st.sampled_from(sorted(suite.SEGMENTS))),
        dtype=dtype,
    )
    outputs = run(suite, implementation, inputs)
    assert outputs["o"].dtype == inputs.v.dtype and outputs["dlog_gamma"].dtype == jnp.float32
    suite.check(inputs, outputs, dtype)


@few_examples(max_examples=6)
@given(seed=st.integers(0, 99), i=st.integers(0, 128), gates=st.sampled_from(["mild", "strong", "wild"]))
def test_future_is_exactly_unseen(suite, implementation, seed, i, gates):
    case = suite.CASES["full"]
    inputs = suite.make_inputs(case, seed, gates, segments="one")
    tokens = np.arange(case.length)[:, None, None]
    inputs = inputs.replace(d_o=jnp.where(tokens == i, inputs.d_o, 0), d_state=jnp.zeros_like(inputs.d_state))
    outputs = run(suite, implementation, inputs)
    for name in TOKENS:
        assert not np.any(outputs[name][:, i + 1 :]), name
        assert np.any(outputs[name][:, : i + 1]), name
    other = suite.make_inputs(case, seed=123, gates="strong")
    future = {
        name: jnp.where(tokens[..., 0] > i if name == "log_gamma" else tokens > i, getattr(other, name), x)
        for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("log_gamma", inputs.log_gamma))
    }
    changed = run(suite, implementation, inputs.replace(**future))
    np.testing.assert_array_equal(outputs["o"][:, : i + 1], changed["o"][:, : i + 1])


@few_examples(max_examples=6)
@given(seed=st.integers(0, 99), segments=st.sampled_from(["sorted", "each token", "ids come back"]))
def test_segments_are_exactly_apart(suite, implementation, seed, segments):
    inputs = suite.make_inputs(suite.CASES["full"], seed, segments=segments)
    ids = np.asarray(inputs.segment_ids)
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    run_of = np.cumsum(starts, 1)
    chosen = run_of == run_of[:, [seed % ids.shape[1]]]
    d_o = jnp.where(chosen[:, :, None, None], inputs.d_o, 0)
    outputs = run(suite, implementation, inputs.replace(d_o=d_o, d_state=jnp.zeros_like(inputs.d_state)))
    for name in TOKENS:
        assert not np.any(outputs[name][~chosen]), name
    assert not np.any(outputs["dlog_gamma"][starts])
    assert not np.any(outputs["dinitial_state"][~chosen[:, 0]])


def test_same_bits_twice(suite, implementation):
    inputs = suite.make_inputs(suite.CASES["full"], gates="wild", dtype="bfloat16")
    first, second = (run(suite, implementation, inputs) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_in_two_pieces_and_token_by_token(suite, implementation):
    inputs = suite.make_inputs(suite.CASES["full"], gates="wild", segments="one")
    whole = run(suite, implementation, inputs)
    call = jax.jit(functools.partial(retention, return_final_state=True, implementation=implementation))
    *arrays, state = inputs.differentiable
    pieces = []
    for piece in (slice(None, 65), slice(65, None)):
        o, state = call(*(x[:, piece] for x in arrays), initial_state=state)
        pieces.append(o)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole["o"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)

    def token(state, inputs):
        o, state = retention_step(*inputs, state)
        return state, o

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in arrays)
    state, o = jax.jit(functools.partial(jax.lax.scan, token))(inputs.initial_state, tokens)
    np.testing.assert_allclose(jnp.moveaxis(o, 0, 1), whole["o"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)


def test_is_gated_linear_attention_with_one_gate(suite, implementation):
    inputs = suite.make_inputs(suite.CASES["plain"], gates="retnet")
    call = jax.jit(functools.partial(retention, scale=0.3, implementation=implementation))
    o = call(inputs.q, inputs.k, inputs.v, inputs.log_gamma)
    log_alpha = jnp.broadcast_to(inputs.log_gamma[:, None], inputs.k.shape)
    want = gated_linear_attention(inputs.q, inputs.k, inputs.v, log_alpha, scale=0.3, implementation="reference")
    assert rms(o - want) < 5e-6 * rms(want)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices: JAX_PLATFORMS=cpu with eight virtual ones")
def test_over_devices_nothing_is_exchanged(suite, implementation):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs = suite.make_inputs(suite.Case(8, 70, 4, 4, 6, segments=True, state=True, fixed=False), gates="wild")
    rows, both = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
    state = P(("data", "fsdp"), "tensor")
    place = lambda x, p: jax.device_put(x, NamedSharding(mesh, p))  # noqa: E731
    differentiable = tuple(place(x, p) for x, p in zip(inputs.differentiable, (*[both] * 4, state), strict=True))
    rest = place(inputs.segment_ids, rows), place(inputs.d_o, both), place(inputs.d_state, state)
    program = outputs_and_gradients(retention, implementation).lower(differentiable, *rest).compile()
    assert not COLLECTIVE.search(program.as_text())
    outputs = dict(zip(suite.OUTPUTS, program(differentiable, *rest), strict=True))
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in outputs.values())
    suite.check(inputs, outputs, "float32")


def test_under_vmap_remat_and_scan_over_layers(suite, implementation):
    inputs = suite.make_inputs(suite.Case(1, 20, 2, 4, 4, segments=False, state=False, fixed=True), gates="retnet")

    def total(name, q):
        attend = functools.partial(retention, k=inputs.k, v=inputs.v, log_gamma=inputs.log_gamma, implementation=name)
        layer = jax.checkpoint(lambda q: jnp.tanh(attend(q)))
        q, _ = jax.lax.scan(lambda q, _: (layer(q), None), q, None, length=2)
        return jnp.sum(q**2)

    rows = jnp.stack([inputs.q, 2 * inputs.q])
    got = jax.jit(jax.vmap(jax.grad(functools.partial(total, implementation))))(rows)
    want = [jax.grad(functools.partial(total, "reference"))(row) for row in rows]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-4)


MISTAKES = {
    "rank": ({"q": jnp.zeros((8, 4, 3))}, "q: got shape (8, 4, 3), wanted [B, T, H, K]"),
    "heads": ({"k": jnp.zeros((2, 8, 2, 3))}, "k: got shape (2, 8, 2, 3), wanted [B=2, T=8, H=4, K=3]"),
    "decay": ({"log_gamma": jnp.zeros((2, 8, 4, 3))}, "log_gamma: got shape (2, 8, 4, 3), wanted [B=2, T=8, H=4]"),
    "fixed decay": ({"log_gamma": jnp.zeros(3)}, "log_gamma: got shape (3,), wanted [H=4]"),
    "dtype": ({"v": jnp.zeros((2, 8, 4, 5), int)}, "v: got dtype int32, wanted bfloat16, float16 or float32"),
    "state": (
        {"initial_state": jnp.zeros((2, 4, 5, 3))},
        "initial_state: got shape (2, 4, 5, 3), wanted [B=2, H=4, K=3, V=5]",
    ),
    "segments": ({"segment_ids": jnp.zeros((2, 9), jnp.int32)}, "segment_ids: got shape (2, 9), wanted [B=2, T=8]"),
    "scale": ({"scale": float("inf")}, "scale: got inf, wanted None or a finite Python number"),
    "name": ({"implementation": "cuda"}, "implementation: got 'cuda', wanted None or one of "),
}


def arguments(dtype=jnp.float32):
    shapes = {"q": (2, 8, 4, 3), "k": (2, 8, 4, 3), "v": (2, 8, 4, 5), "log_gamma": (2, 8, 4)}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        retention(**arguments() | changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_mistakes_in_a_step_are_named():
    a = {name: x[:, 0] for name, x in arguments().items()}
    with pytest.raises(ValueError, match=r"state: got shape \(2, 4, 5, 3\), wanted \[B=2, H=4, K=3, V=5\]"):
        retention_step(*a.values(), jnp.zeros((2, 4, 5, 3)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choice depends on the platform")
def test_choice_on_cpu():
    choice = choose(**arguments())
    assert choice.implementation == "xla"
    assert all(isinstance(reason, str) and reason for reason in choice.passed_over.values())
    with jax.enable_x64():
        wide = arguments(jnp.float64)
        assert choose(**wide).implementation == "reference"
        with pytest.raises(NotImplementedError, match="'xla' cannot run this call: q is float64"):
            retention(**wide, implementation="xla")
