"""States and gradients between pieces of a sequence, against a walk from piece to piece."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gla.mosaic_gpu import pieces
from kernels.gla.mosaic_gpu.tiles import backward_tiles, forward_tiles

B, H, G, N, K, V, LENGTH = 2, 4, 2, 5, 3, 2, 8


@pytest.fixture(params=["one document", "documents"])
def case(request):
    rng = np.random.default_rng(0)
    own = rng.standard_normal((B, H, N, K, V)).astype(np.float32)
    end = rng.standard_normal((B, H, 1, K, V)).astype(np.float32)
    log_alpha = -rng.uniform(0, 0.2, (B, N * LENGTH, G, K)).astype(np.float32)
    log_alpha[0, LENGTH + 1, 0, 0] = -np.inf
    documents = None
    if request.param == "documents":
        starts = np.zeros((B, N * LENGTH), np.int32)
        starts[0, [LENGTH, 3 * LENGTH + 2]] = 1  # one starts with a piece, one inside a piece
        starts[1, [2 * LENGTH - 1, 4 * LENGTH]] = 1
        documents = np.cumsum(starts, axis=1, dtype=np.int32)
    return own, end, log_alpha, documents


def _whole(log_alpha, documents):
    """Per piece: the decay through it, and whether the token before it is of its first document, and of its last."""
    with np.errstate(over="ignore"):
        decay = np.exp(log_alpha.reshape(B, N, LENGTH, G, K).sum(2))
    decay = np.repeat(np.moveaxis(decay, 1, 2), H // G, axis=1)[..., None]
    joined = through = np.ones((B, N), bool)
    if documents is not None:
        rows = documents.reshape(B, N, LENGTH)
        before = np.concatenate([rows[:, :1, 0], rows[:, :-1, -1]], axis=1)
        joined, through = before == rows[:, :, 0], before == rows[:, :, -1]
    return decay, joined[:, None, :, None, None], through[:, None, :, None, None]


def test_entering_states(case):
    own, first, log_alpha, documents = case
    decay, _, through = _whole(log_alpha, documents)
    want = [first[:, :, 0]]
    for n in range(N - 1):
        want.append(own[:, :, n] + np.where(through[:, :, n], decay[:, :, n] * want[-1], 0))
    got = pieces.entering_states(*map(_array, (own, first, log_alpha, documents)))
    np.testing.assert_allclose(got, np.stack(want, 2), rtol=1e-5, atol=1e-6)


def test_leaving_gradients(case):
    own, last, log_alpha, documents = case
    decay, joined, through = _whole(log_alpha, documents)
    want = [last[:, :, 0]]
    for n in range(N - 1, 0, -1):
        entering = np.where(joined[:, :, n], own[:, :, n], 0) + np.where(through[:, :, n], decay[:, :, n] * want[-1], 0)
        want.append(entering)
    got = pieces.leaving_gradients(*map(_array, (own, last, log_alpha, documents)))
    np.testing.assert_allclose(got, np.stack(want[::-1], 2), rtol=1e-5, atol=1e-6)


def test_few_walks_are_cut_and_many_are_not():
    assert forward_tiles((1, 32768, 4, 256), (1, 32768, 4, 512)).segments == 16
    assert backward_tiles((1, 32768, 4, 256), (1, 32768, 4, 512)).segments == 8
    assert forward_tiles((32, 2048, 16, 64), (32, 2048, 16, 64)).segments == 1
    assert forward_tiles((1, 64, 1, 64), (1, 64, 1, 64)).segments == 1


def _array(x):
    return None if x is None else jnp.asarray(x)
