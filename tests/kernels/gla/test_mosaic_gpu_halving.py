"""The table that halves the chunks of wide heads, and the factors of packed documents, against plain definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gla.mosaic_gpu import documents, halving

ROW, COLUMN = np.arange(64)[:, None], np.arange(64)[None]


@pytest.fixture(autouse=True)
def arrays_for_references(monkeypatch):
    monkeypatch.setattr(halving, "load", lambda table: table)


def bit(number):
    return (halving.table() >> number) & 1 == 1


@pytest.mark.parametrize("fits", [5, 4, 3, -1])
def test_every_pair_is_in_one_product(fits):
    """Pairs across at levels above `fits`, and pairs within blocks there: each i >= t once."""
    table = jnp.asarray(halving.table())
    count = np.zeros((64, 64), int)
    for n in range(5, fits, -1):
        count += np.asarray(halving.pairs_across(table, n))
    count += np.asarray(halving.pairs_within(table, fits))
    np.testing.assert_array_equal(count, 1)
    np.testing.assert_array_equal(halving.up_to(table), COLUMN <= ROW)
    before, from_here = halving.triangles(table)
    np.testing.assert_array_equal(before, COLUMN < ROW)
    np.testing.assert_array_equal(from_here, COLUMN >= ROW)
    for n in range(6):
        same_block = ROW >> (n + 1) == COLUMN >> (n + 1)
        within, across = (halving.indicator(table, bits) for bits in ((1 << (n + 1)) - 1, 1 << n))
        np.testing.assert_array_equal(within, same_block & (COLUMN != ROW))
        np.testing.assert_array_equal(across, halving.pairs_across(table, n))


@pytest.mark.parametrize("n", range(6))
def test_exponents_of_a_level_add_up_to_those_of_its_pairs(n):
    gates = -np.random.default_rng(n).random(64)
    exponents = bit(halving.LEVEL + n) @ gates
    running = np.cumsum(gates)
    across = np.asarray(halving.pairs_across(jnp.asarray(halving.table()), n)) & (COLUMN < ROW)
    i, j = np.nonzero(across)
    np.testing.assert_allclose(exponents[i] + exponents[j], running[i] - running[j], atol=1e-12)
    np.testing.assert_allclose(bit(halving.PREFIX) @ gates, running)
    np.testing.assert_allclose(bit(halving.SUFFIX) @ gates, running[-1] - running, atol=1e-12)


def test_a_bit_of_the_table_is_a_matrix_of_ones():
    table = jnp.asarray(halving.table())
    for number in (halving.PREFIX, halving.SUFFIX, *range(halving.LEVEL, halving.LEVEL + 6)):
        np.testing.assert_array_equal(np.asarray(halving.matrix(table, number), np.float32), bit(number))
    for number in range(halving.LEVEL, halving.LEVEL + 6):
        np.testing.assert_array_equal(np.asarray(halving.matrix(table, jnp.int32(number)), np.float32), bit(number))
    assert not np.any(halving.matrix(table, jnp.int32(halving.LEVEL - 1)))  # single rows: no gates in between


def test_factors_of_documents():
    numbers = np.cumsum(np.random.default_rng(0).random((2, 256)) < 0.03, axis=1)
    factors = np.asarray(documents.factors(jnp.asarray(numbers)))
    before = np.concatenate([numbers[:, :1], numbers[:, :-1]], axis=1)
    for b in range(2):
        for c in range(4):
            rows, first = numbers[b, c * 64 : c * 64 + 64], before[b, c * 64]
            parts = factors[b, c].reshape(4, 64)
            np.testing.assert_array_equal(parts[documents.NUMBER] == 0, rows == first)
            np.testing.assert_array_equal(parts[documents.NUMBER], parts[documents.NUMBER_AGAIN])
            np.testing.assert_array_equal(parts[documents.REACHING], rows == rows[-1])
            np.testing.assert_array_equal(parts[documents.GOES_ON], rows == before[b, c * 64 : c * 64 + 64])
    assert documents.factors(None) is None
