"""The suite every implementation passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import against_oracle
from against_oracle import few_examples, rms
from kernels import gated_linear_attention, gated_linear_attention_step


def run(gla, implementation, inputs):
    return against_oracle.run(gated_linear_attention, implementation.name, gla.OUTPUTS, inputs)


@few_examples(max_examples=30)
@given(data=st.data())
def test_outputs_and_gradients(gla, implementation, dtype, data):
    case = gla.CASES[
        data.draw(st.sampled_from(implementation.cases if dtype != "float16" else implementation.cases[-1:]))
    ]
    inputs = gla.make_inputs(
        case,
        seed=data.draw(st.integers(0, 2**16)),
        gates=data.draw(st.sampled_from(sorted(gla.GATES))),
        segments=data.draw(st.sampled_from(sorted(gla.SEGMENTS))),
        dtype=dtype,
    )
    gla.check(inputs, run(gla, implementation, inputs), dtype)


def test_bfloat16_with_float32_gates(gla, implementation):
    inputs = gla.make_inputs(gla.CASES["full"], gates="wild", dtype="bfloat16", gate_dtype="float32")
    outputs = run(gla, implementation, inputs)
    assert outputs["dlog_alpha"].dtype == jnp.float32
    gla.check(inputs, outputs, "bfloat16")


def test_states_outgrow_float16(gla, implementation):
    """States beyond 65504, outputs within it."""
    inputs = gla.make_inputs(gla.CASES["full"], gates="zero", segments="one", dtype="float16")
    inputs = inputs.replace(q=inputs.q * 1e-4, k=jnp.full_like(inputs.k, 1e2), v=jnp.full_like(inputs.v, 1e3))
    outputs, expected = run(gla, implementation, inputs), gla.oracle(inputs)
    assert np.max(expected["final_state"]) > 1e7
    for name in ("o", "final_state"):
        assert rms(outputs[name] - expected[name]) < 1e-3 * rms(expected[name])


@few_examples(max_examples=10)
@given(data=st.data())
def test_future_is_exactly_unseen(gla, implementation, data):
    case = gla.CASES[implementation.cases[-1]]
    gates = data.draw(st.sampled_from(["mild", "unscaled", "strong", "wild"]))
    inputs = gla.make_inputs(case, seed=data.draw(st.integers(0, 99)), gates=gates, segments="one")
    i = data.draw(st.integers(0, case.length - 2))
    tokens = np.arange(case.length)[:, None, None]
    inputs = inputs.replace(d_o=np.where(tokens == i, inputs.d_o, 0), d_state=np.zeros_like(inputs.d_state))
    outputs = run(gla, implementation, inputs)
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][:, i + 1 :]), name
        assert np.any(outputs[name][:, : i + 1]), name
    other = gla.make_inputs(case, seed=123, gates="strong")
    names = ("q", "k", "v", "log_alpha")
    future = {name: np.where(tokens > i, getattr(other, name), getattr(inputs, name)) for name in names}
    changed = run(gla, implementation, inputs.replace(**future))
    np.testing.assert_array_equal(outputs["o"][:, : i + 1], changed["o"][:, : i + 1])


@few_examples(max_examples=10)
@given(data=st.data())
def test_segments_are_exactly_apart(gla, implementation, data):
    case = gla.CASES[implementation.cases[-1]]
    gates = data.draw(st.sampled_from(["mild", "zero", "wild"]))
    segments = data.draw(st.sampled_from(["sorted", "each token", "ids come back"]))
    inputs = gla.make_inputs(case, seed=data.draw(st.integers(0, 99)), gates=gates, segments=segments)
    ids = np.asarray(inputs.segment_ids)
    run_of = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), 1)
    chosen = run_of == run_of[:, [data.draw(st.integers(0, case.length - 1))]]
    d_o = np.where(chosen[:, :, None, None], inputs.d_o, 0)
    inputs = inputs.replace(d_o=d_o, d_state=np.zeros_like(inputs.d_state))
    outputs = run(gla, implementation, inputs)
    for name in ("dq", "dk", "dv", "dlog_alpha"):
        assert not np.any(outputs[name][~chosen]), name
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    assert not np.any(outputs["dlog_alpha"][starts])
    assert not np.any(outputs["dinitial_state"][~chosen[:, 0]])


def test_same_bits_twice(gla, implementation):
    inputs = gla.make_inputs(gla.CASES["full"], gates="wild", dtype="bfloat16")
    first, second = (run(gla, implementation, inputs) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_in_two_pieces_with_the_state_between(gla, implementation):
    inputs = gla.make_inputs(gla.CASES["full"], gates="unscaled", segments="one")
    whole = run(gla, implementation, inputs)
    call = functools.partial(gated_linear_attention, return_final_state=True, implementation=implementation.name)
    call, state, pieces = jax.jit(call), inputs.initial_state, []
    for piece in (slice(None, 65), slice(65, None)):
        arrays = (x[:, piece] for x in (inputs.q, inputs.k, inputs.v, inputs.log_alpha))
        o, state = call(*arrays, initial_state=state)
        pieces.append(o)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole["o"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)


def test_decoding_step_by_step(gla, implementation):
    inputs = gla.make_inputs(gla.CASES["full"], gates="resets", segments="one")
    whole = run(gla, implementation, inputs)

    def token(state, x):
        o, state = gated_linear_attention_step(*x, state)
        return state, o

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (inputs.q, inputs.k, inputs.v, inputs.log_alpha))
    state, o = jax.jit(lambda state, tokens: jax.lax.scan(token, state, tokens))(inputs.initial_state, tokens)
    np.testing.assert_allclose(jnp.moveaxis(o, 0, 1), whole["o"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)


def test_scale(gla, implementation):
    inputs = gla.make_inputs(gla.CASES["plain"])
    call = jax.jit(functools.partial(gated_linear_attention, scale=0.3, implementation=implementation.name))
    o = call(inputs.q, inputs.k, inputs.v, inputs.log_alpha)
    assert rms(o - gla.oracle(inputs, scale=0.3)["o"]) < 5e-6 * rms(o)


def test_under_vmap_remat_and_scan_over_layers(gla, implementation):
    """A scan over two rematerialised layers, mapped over three examples, against loops over the recurrence."""
    case = gla.CASES["full"]
    examples = [gla.make_inputs(case, seed=seed, gates="unscaled") for seed in range(3)]

    def layer(x, inputs, name=implementation.name):
        q, k, v, log_alpha, segment_ids = inputs
        o = gated_linear_attention(q, k, v + x, log_alpha, segment_ids=segment_ids, implementation=name)
        return o[:, :, : case.groups], None

    def in_scan(*inputs):
        twice = [jnp.stack([x, x]) for x in inputs]
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), jnp.zeros_like(inputs[2]), twice)[0] ** 2)

    def in_loop(*inputs):
        first, _ = layer(jnp.zeros_like(inputs[2]), inputs, "reference")
        return jnp.sum(layer(first, inputs, "reference")[0] ** 2)

    arrays = [(e.q, e.k, e.v, e.log_alpha, e.segment_ids) for e in examples]
    stacked = [jnp.stack(x) for x in zip(*arrays, strict=True)]
    mapped = jax.jit(jax.vmap(jax.grad(in_scan, argnums=(0, 1, 2, 3))))(*stacked)
    looped = jax.jit(jax.grad(in_loop, argnums=(0, 1, 2, 3)))
    for example, inputs in enumerate(arrays):
        for got, want in zip(mapped, looped(*inputs), strict=True):
            assert rms(got[example] - want) < 1e-5 * rms(want)


def test_backward_memory_is_linear_in_length(gla, implementation):
    """And less than a state per token, with the many rows that CPUs keep apart where a GPU fuses them."""
    if implementation.name == "reference":
        pytest.skip("the recurrence is the definition, not made to be small")

    def bytes_at(length):
        inputs = [jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)] * 4
        call = functools.partial(gated_linear_attention, implementation=implementation.name)
        loss = lambda *x: call(*x).astype(jnp.float32).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = bytes_at(2048), bytes_at(8192)
    assert long < 4.2 * short
    assert long < 8192 * 128 * 128 * 4 / 2
