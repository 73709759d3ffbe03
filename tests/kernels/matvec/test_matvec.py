"""Products of a decode step against NumPy in float64; the Triton kernel in Pallas's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import matvec
from kernels.matvec import pallas_triton, plain

CASES = {  # width, outputs, head of the norm or None, gate, swiglu, residual
    "plain": (96, 24, None, False, False, False),
    "residual, odd width": (176, 16, None, False, False, True),
    "norm, swiglu": (96, 24, 96, False, True, False),
    "heads, gate, residual": (128, 16, 32, True, False, True),
    "everything": (64, 8, 16, True, True, True),
}


def drawn(case, batch, dtype):
    width, outputs, head, gate, swiglu, residual = CASES[case]
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (batch, width)).astype(dtype)
    weight = (jax.random.normal(keys[1], (outputs * (2 if swiglu else 1), width)) / 8).astype(dtype)
    options = {
        "norm_weight": None if head is None else jax.random.uniform(keys[2], (head,), minval=0.5),
        "gate": jax.random.normal(keys[3], (batch, width + 16)).astype(dtype) if gate else None,
        "residual": jax.random.normal(keys[4], (batch, outputs)).astype(dtype) if residual else None,
        "swiglu": swiglu,
    }
    return x, weight, options


def expected(x, weight, norm_weight, gate, residual, swiglu, eps):
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    if norm_weight is not None:
        heads = x.reshape(len(x), -1, len(norm_weight))
        scale = np.sqrt(np.mean(heads**2, -1, keepdims=True) + eps)
        x = (heads / scale * np.asarray(norm_weight)).reshape(x.shape)
    if gate is not None:
        x = x * silu(np.asarray(gate, np.float64)[:, -x.shape[1] :])
    y = x @ weight.T
    if swiglu:
        y = silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :]
    return y if residual is None else y + np.asarray(residual, np.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_against_float64(case: str, implementation: str, dtype, bound: float):
    x, weight, options = drawn(case, 3, dtype)
    run = plain.matvec
    if implementation == "pallas_triton":
        run = functools.partial(pallas_triton.matvec, interpret=True)
    y = np.asarray(run(x, weight, **options, eps=1e-3, dtype=jnp.dtype(jnp.float32)))
    want = expected(x, weight, **options, eps=1e-3)
    assert np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2)) < bound


def test_groups_of_rows():
    """Several groups of rows to a program, of which the next is asked for early."""
    x, weight, options = drawn("norm, swiglu", 1, jnp.float32)
    assert pallas_triton._rows_and_groups(1, len(weight)) == (2, 4)
    assert pallas_triton._rows_and_groups(1, 6) == (2, 1)
    assert pallas_triton._rows_and_groups(3, len(weight)) == (2, 1)
    options |= {"swiglu": False}
    y = pallas_triton.matvec(x, weight, **options, eps=1e-3, dtype=jnp.dtype(jnp.float32), interpret=True)
    want = expected(x, weight, **options, eps=1e-3)
    assert np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2)) < 1e-6


@pytest.mark.parametrize("size", [16, 96, 2816, 5632, 10944])
def test_pieces_are_powers_of_two_that_cover_a_row(size: int):
    pieces = pallas_triton._pieces(size)
    assert [start for start, _ in pieces] == list(np.cumsum([0] + [length for _, length in pieces])[:-1])
    assert sum(length for _, length in pieces) == size
    assert all(length & (length - 1) == 0 for _, length in pieces)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": jnp.zeros((8, 5))}, "weight: got shape"),
        ({"weight": jnp.zeros((8, 64), jnp.bfloat16)}, "weight: got dtype"),
        ({"norm_weight": jnp.ones(7)}, "norm_weight: got shape"),
        ({"gate": jnp.zeros((3, 63))}, "gate: got shape"),
        ({"residual": jnp.zeros((3, 9))}, "residual: got shape"),
        ({"weight": jnp.zeros((7, 64)), "swiglu": True}, "weight: got 7 rows"),
    ],
)
def test_wrong_arguments(change: dict, message: str):
    arguments = {"x": jnp.zeros((3, 64)), "weight": jnp.zeros((8, 64))} | change
    with pytest.raises(ValueError, match=message):
        matvec(**arguments)


def test_a_named_implementation_raises():
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        matvec(jnp.zeros((3, 64)), jnp.zeros((8, 64)), implementation="pallas_triton")
