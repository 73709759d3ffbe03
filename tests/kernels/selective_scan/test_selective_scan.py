"""The suite every implementation passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import against_oracle
from against_oracle import few_examples, outputs_and_gradients
from kernels import selective_scan, selective_scan_step
from kernels.selective_scan import choose

TOKENS = ("dx", "ddt", "dB", "dC")


def run(scan, implementation, inputs):
    return against_oracle.run(selective_scan, implementation, scan.OUTPUTS, inputs)


@few_examples(max_examples=25)
@given(data=st.data())
def test_outputs_and_gradients(scan, implementation, data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    case = scan.CASES[data.draw(st.sampled_from(sorted(scan.CASES)))]
    inputs = scan.make_inputs(
        case,
        seed=data.draw(st.integers(0, 2**16)),
        steps=data.draw(st.sampled_from(sorted(scan.STEPS))),
        segments=data.draw(st.sampled_from(sorted(scan.SEGMENTS))),
        dtype=dtype,
    )
    outputs = run(scan, implementation, inputs)
    assert outputs["y"].dtype == outputs["ddt"].dtype == inputs.x.dtype
    scan.check(inputs, outputs, dtype)


@few_examples(max_examples=6)
@given(seed=st.integers(0, 99), i=st.integers(0, 68), steps=st.sampled_from(["mamba", "wild"]))
def test_future_is_exactly_unseen(scan, implementation, seed, i, steps):
    case = scan.CASES["full"]
    inputs = scan.make_inputs(case, seed, steps, segments="one")
    tokens = np.arange(case.length)[:, None]
    inputs = inputs.replace(d_y=jnp.where(tokens == i, inputs.d_y, 0), d_state=jnp.zeros_like(inputs.d_state))
    outputs = run(scan, implementation, inputs)
    for name in TOKENS:
        assert not np.any(outputs[name][:, i + 1 :]), name
        assert np.any(outputs[name][:, : i + 1]), name
    other = scan.make_inputs(case, seed=123, steps="large")
    names = ("x", "dt", "B", "C")
    future = {name: jnp.where(tokens > i, getattr(other, name), getattr(inputs, name)) for name in names}
    changed = run(scan, implementation, inputs.replace(**future))
    np.testing.assert_array_equal(outputs["y"][:, : i + 1], changed["y"][:, : i + 1])


@few_examples(max_examples=6)
@given(seed=st.integers(0, 99), segments=st.sampled_from(["sorted", "each token", "ids come back"]))
def test_segments_are_exactly_apart(scan, implementation, seed, segments):
    inputs = scan.make_inputs(scan.CASES["full"], seed, segments=segments)
    ids = np.asarray(inputs.segment_ids)
    run_of = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), 1)
    chosen = run_of == run_of[:, [seed % ids.shape[1]]]
    d_y = jnp.where(chosen[:, :, None], inputs.d_y, 0)
    outputs = run(scan, implementation, inputs.replace(d_y=d_y, d_state=jnp.zeros_like(inputs.d_state)))
    for name in TOKENS:
        assert not np.any(outputs[name][~chosen]), name
    assert not np.any(outputs["dinitial_state"][~chosen[:, 0]])


def test_same_bits_twice(scan, implementation):
    inputs = scan.make_inputs(scan.CASES["full"], steps="wild", dtype="bfloat16")
    first, second = (run(scan, implementation, inputs) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


def test_in_two_pieces_and_token_by_token(scan, implementation):
    inputs = scan.make_inputs(scan.CASES["full"], segments="one")
    whole = run(scan, implementation, inputs)
    call = jax.jit(functools.partial(selective_scan, return_final_state=True, implementation=implementation))
    x, dt, A, B, C, D, state = inputs.differentiable
    pieces = []
    for piece in (slice(None, 35), slice(35, None)):
        y, state = call(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], D, initial_state=state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole["y"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)

    def token(state, inputs):
        x_t, dt_t, B_t, C_t = inputs
        y_t, state = selective_scan_step(x_t, dt_t, A, B_t, C_t, D, state)
        return state, y_t

    tokens = tuple(jnp.moveaxis(array, 1, 0) for array in (x, dt, B, C))
    state, y = jax.jit(functools.partial(jax.lax.scan, token))(inputs.initial_state, tokens)
    np.testing.assert_allclose(jnp.moveaxis(y, 0, 1), whole["y"], atol=2e-5)
    np.testing.assert_allclose(state, whole["final_state"], atol=2e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices: JAX_PLATFORMS=cpu with eight virtual ones")
def test_over_devices_nothing_is_gathered(scan, implementation):
    """Batch and channels stay apart; the gradients of B and C (A and D) are sums over channels (over rows)."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs = scan.make_inputs(scan.Case(4, 40, 4, 3, segments=True, state=True))
    rows, both = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
    partition = (both, both, P("tensor"), rows, rows, P("tensor"), P(("data", "fsdp"), "tensor"))
    place = lambda x, p: jax.device_put(x, NamedSharding(mesh, p))  # noqa: E731
    differentiable = tuple(place(x, p) for x, p in zip(inputs.differentiable, partition, strict=True))
    rest = place(inputs.segment_ids, rows), place(inputs.d_y, both), place(inputs.d_state, partition[-1])
    program = outputs_and_gradients(selective_scan, implementation).lower(differentiable, *rest).compile()
    assert not any(word in program.as_text() for word in (" all-gather(", " all-to-all(", " collective-permute("))
    outputs = dict(zip(scan.OUTPUTS, program(differentiable, *rest), strict=True))
    assert outputs["y"].addressable_shards[0].data.size * 8 == outputs["y"].size
    scan.check(inputs, outputs, "float32")


def test_under_vmap_remat_and_scan_over_layers(scan, implementation):
    inputs = scan.make_inputs(scan.Case(1, 20, 4, 3, segments=False, state=False))
    *arrays, _ = inputs.differentiable

    def total(name, x):
        layer = jax.checkpoint(lambda x: jnp.tanh(selective_scan(x, *arrays[1:], implementation=name)))
        x, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=2)
        return jnp.sum(x**2)

    rows = jnp.stack([inputs.x, 2 * inputs.x])
    got = jax.jit(jax.vmap(jax.grad(functools.partial(total, implementation))))(rows)
    want = [jax.grad(functools.partial(total, "reference"))(row) for row in rows]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-4)


MISTAKES = {
    "rank": ({"x": jnp.zeros((8, 4))}, "x: got shape (8, 4), wanted [B, T, E]"),
    "channels": ({"dt": jnp.zeros((2, 8, 5))}, "dt: got shape (2, 8, 5), wanted [B=2, T=8, E=4]"),
    "states": ({"B": jnp.zeros((2, 8, 5))}, "B: got shape (2, 8, 5), wanted [B=2, T=8, N=3]"),
    "dtype of A": ({"A": jnp.zeros((4, 3), jnp.bfloat16)}, "A: got dtype bfloat16, wanted float32"),
    "dtype": ({"x": jnp.zeros((2, 8, 4), int)}, "x: got dtype int32, wanted bfloat16, float16 or float32"),
    "skip": ({"D": jnp.zeros(3)}, "D: got shape (3,), wanted [E=4]"),
    "state": ({"initial_state": jnp.zeros((2, 3, 4))}, "initial_state: got shape (2, 3, 4), wanted [B=2, E=4, N=3]"),
    "segments": ({"segment_ids": jnp.zeros((2, 9), jnp.int32)}, "segment_ids: got shape (2, 9), wanted [B=2, T=8]"),
    "name": ({"implementation": "cuda"}, "implementation: got 'cuda', wanted None or one of "),
}


def arguments(dtype=jnp.float32):
    shapes = {"x": (2, 8, 4), "dt": (2, 8, 4), "A": (4, 3), "B": (2, 8, 3), "C": (2, 8, 3), "D": (4,)}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        selective_scan(**arguments() | changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_mistakes_in_a_step_are_named():
    a = arguments()
    with pytest.raises(ValueError, match=r"B_t: got shape \(2, 4\), wanted \[B=2, N=3\]"):
        selective_scan_step(a["x"][:, 0], a["dt"][:, 0], a["A"], jnp.zeros((2, 4)), a["C"][:, 0], a["D"], None)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choice depends on the platform")
def test_choice_on_cpu():
    choice = choose(**arguments())
    assert choice.implementation == "xla"
    assert all(isinstance(reason, str) and reason for reason in choice.passed_over.values())
    with jax.enable_x64():
        wide = arguments(jnp.float64)
        assert choose(**wide).implementation == "reference"
        with pytest.raises(NotImplementedError, match="'xla' cannot run this call: x is float64"):
            selective_scan(**wide, implementation="xla")
