"""What pieces of a sequence do to the state that enters them, in Pallas' interpreter, against a walk token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.gla.mosaic_gpu.pieces import WHOLE, Cut, decay_sums, own_gradients, own_states
from kernels.gla.mosaic_gpu.tiles import backward_tiles, forward_tiles

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter runs on CPU")
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
B, H, G, N, K, V, LENGTH = 1, 2, 1, 3, 64, 64, 128


@pytest.fixture(params=["one document", "documents"])
def case(request):
    rng = np.random.default_rng(0)

    def normal(heads, width):
        return jnp.asarray(rng.standard_normal((B, N * LENGTH, heads, width)), jnp.bfloat16)

    x = {"q": normal(H, K), "k": normal(G, K), "v": normal(G, V), "do": normal(H, V)}
    log_alpha = -rng.uniform(0, 0.02, (B, N * LENGTH, G, K))
    log_alpha[0, LENGTH + 1, 0, 0] = -np.inf
    x["log_alpha"] = jnp.asarray(log_alpha, jnp.bfloat16)
    documents = None
    if request.param == "documents":  # one ends inside the first piece; one starts with the third
        documents = np.zeros((B, N * LENGTH), np.int32)
        documents[0, 70:] = 1
        documents[0, 2 * LENGTH :] = 2
    return x, documents


def check(got, want):
    error = np.sqrt(np.mean((np.asarray(got) - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30)
    assert error < 3e-3


def test_own_states(case, capfd):
    x, documents = case
    got = own_states(
        x["k"], x["v"], x["log_alpha"], decay_sums(reverse=False), cut=Cut(N), documents=documents, interpret=INTERPRET
    )
    k, v, g = (np.asarray(x[name][0, :, 0], np.float64) for name in ("k", "v", "log_alpha"))
    ids = np.zeros(N * LENGTH) if documents is None else documents[0]
    for n in range(N - 1):
        own, decay = np.zeros((K, V)), np.ones(K)
        for t in range(n * LENGTH, (n + 1) * LENGTH):
            goes_on = t == 0 or ids[t] == ids[t - 1]
            own = own * np.exp(g[t])[:, None] * goes_on + np.outer(k[t], v[t])
            decay = decay * np.exp(g[t]) * goes_on
        check(got.own[0, 0, n], own)
        check(got.decay[0, 0, n], decay)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_own_gradients(case, capfd):
    x, documents = case
    got = own_gradients(
        x["q"],
        x["do"],
        x["log_alpha"],
        decay_sums(reverse=True),
        scale=0.5,
        cut=Cut(N),
        documents=documents,
        interpret=INTERPRET,
    )
    g = np.asarray(x["log_alpha"][0, :, 0], np.float64)
    ids = np.zeros(N * LENGTH) if documents is None else documents[0]
    for h in range(H):
        q, do = (np.asarray(x[name][0, :, h], np.float64) for name in ("q", "do"))
        for n in range(1, N):
            end = (n + 1) * LENGTH
            own, decay = np.zeros((K, V)), np.ones(K) * (n == N - 1 or ids[end] == ids[end - 1])
            for t in reversed(range(n * LENGTH, end)):
                goes_on = ids[t] == ids[t - 1]
                own = (own + 0.5 * np.outer(q[t], do[t])) * np.exp(g[t])[:, None] * goes_on
                decay = decay * np.exp(g[t]) * goes_on
            check(got.own[0, h, n - 1], own)
            check(got.decay[0, h, n - 1], decay)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_few_walks_are_cut_and_many_are_not():
    assert forward_tiles((1, 32768, 4, 128), (1, 32768, 4, 128)).cut == Cut(32)
    assert backward_tiles((1, 32768, 4, 128), (1, 32768, 4, 128)).cut == Cut(32)
    assert forward_tiles((32, 2048, 16, 64), (32, 2048, 16, 64)).cut == WHOLE
    assert forward_tiles((1, 64, 1, 64), (1, 64, 1, 64)).cut == WHOLE


def test_short_pieces_fill_what_walks_leave_of_the_card():
    """96 of 132 multiprocessors have a walk: three short pieces follow each other on each of the others."""
    assert forward_tiles((1, 8192, 96, 128), (1, 8192, 96, 128)).cut == Cut(2, shorter=64)
    assert backward_tiles((1, 8192, 96, 128), (1, 8192, 96, 128)).cut == Cut(2, shorter=64)


@pytest.mark.parametrize("last", [False, True])
def test_pieces_follow_each_other(last):
    cut, chunks, at = Cut(3, shorter=2), 13, 0
    for piece in range(3):
        first, count = (int(x) for x in cut.span(jnp.int32(piece), chunks, shorter_last=last))
        assert first == at and count == (3 if piece == (2 if last else 0) else 5)
        at += count
    assert at == chunks
