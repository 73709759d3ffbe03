"""Pairs of tokens around a chunk, from sums over states and gradients at some chunk boundaries."""

import numpy as np
import pytest

from kernels.gla.mosaic_gpu.across import ANCHOR, NOTHING, pairs_across


def sums(C, low=0.1, K=3, V=5, seed=0):
    """What `pairs_across` takes, and what it should return, of a recurrence of chunks in float64."""
    rng = np.random.default_rng(seed)
    decay = rng.uniform(low, 1, (C, K))
    additions, gradients = rng.normal(size=(2, C, K, V))
    S, dS = np.zeros((C + 1, K, V)), np.zeros((C + 1, K, V))
    S[0], dS[C] = rng.normal(size=(2, K, V))
    for c in range(C):
        S[c + 1] = decay[c][:, None] * S[c] + additions[c]
    for c in reversed(range(C)):
        dS[c] = decay[c][:, None] * dS[c + 1] + gradients[c]
    W = (S * dS).sum(-1)
    known = W[[*range(0, C, ANCHOR), C]]
    entered, left = (S[:-1] * gradients).sum(-1), (additions * dS[1:]).sum(-1)
    return [x[None, None] for x in (known, entered, left, decay)], decay * (S[:-1] * dS[1:]).sum(-1)


@pytest.mark.parametrize("C", [1, 3, ANCHOR, ANCHOR + 1, 3 * ANCHOR])
def test_is_what_states_and_gradients_say(C):
    given, expected = sums(C)
    np.testing.assert_allclose(pairs_across(*given)[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_rounding_does_not_pile_up():
    """Errors of a chunk's own sums stay those of a few chunks, however long the sequence."""
    (known, entered, left, decay), expected = sums(400, low=0.9)
    rng = np.random.default_rng(1)
    entered, left = (x * (1 + 1e-3 * rng.normal(size=x.shape)) for x in (entered, left))
    error = np.asarray(pairs_across(known, entered, left, decay))[0, 0] - expected
    typical = 1e-3 * np.sqrt(np.mean(entered**2))
    assert np.sqrt(np.mean(error**2)) < np.sqrt(ANCHOR) * typical


def test_is_zero_where_nothing_passes_the_chunk():
    (known, entered, left, decay), _ = sums(3 * ANCHOR)
    decay[..., 5, :] = NOTHING / 2
    assert not np.any(np.asarray(pairs_across(known, entered, left, decay))[0, 0, 5])


@pytest.mark.parametrize("c", [0, 2, ANCHOR, 2 * ANCHOR + 1])
def test_is_exactly_zero_after_the_last_gradient(c):
    """What an output says about later gates is 0, not the rounding of what it says about earlier ones."""
    (known, entered, left, decay), _ = sums(3 * ANCHOR)
    entered[..., c + 1 :, :], left[..., c:, :] = 0, 0  # gradients reach chunk c, none comes from later ones
    known[..., c // ANCHOR + 1 :, :] = 0
    assert not np.any(np.asarray(pairs_across(known, entered, left, decay))[0, 0, c:])
