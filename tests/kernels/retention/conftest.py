"""What the shared suite runs on: the implementations, the cases, and a float64 oracle that shares no code with them."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import against_oracle
from against_oracle import SEGMENTS

IMPLEMENTATIONS = ["reference", "xla"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes are few and fixed, so that each compiles once; everything else is drawn."""

    batch: int
    length: int
    heads: int
    key_width: int
    value_width: int
    segments: bool
    state: bool
    fixed: bool  # a decay of each head, not of each token


CASES = {
    "token": Case(1, 1, 1, 1, 1, segments=False, state=True, fixed=False),
    "plain": Case(1, 200, 2, 16, 8, segments=False, state=False, fixed=True),
    "full": Case(2, 130, 3, 8, 16, segments=True, state=True, fixed=False),
}

GATES = {
    "retnet": lambda rng, shape: np.broadcast_to(np.log1p(-(2.0 ** (-5 - np.arange(shape[-1])))), shape),
    "mild": lambda rng, shape: -np.logaddexp(0, -rng.normal(size=shape)) / 16,
    "strong": lambda rng, shape: rng.uniform(-60, 0, shape),
    "wild": lambda rng, shape: np.where(rng.random(shape) < 0.05, -np.inf, -np.exp(3 * rng.normal(size=shape) - 1)),
    "zero": lambda rng, shape: np.zeros(shape),
    "none pass": lambda rng, shape: np.full(shape, -np.inf),
}


@dataclasses.dataclass
class Inputs(against_oracle.Inputs):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_gamma: jax.Array
    initial_state: jax.Array | None
    segment_ids: jax.Array | None
    d_o: jax.Array
    d_state: jax.Array

    DECAYS = ("log_gamma",)


def make_inputs(case, seed=0, gates="mild", segments="sorted", dtype="float32") -> Inputs:
    """Decays are float32: bf16 would round RetNet's to coarse steps."""
    rng = np.random.default_rng(seed)
    c = case
    tokens, state = (c.batch, c.length), (c.batch, c.heads, c.key_width, c.value_width)
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return Inputs(
        q=normal(*tokens, c.heads, c.key_width),
        k=normal(*tokens, c.heads, c.key_width),
        v=normal(*tokens, c.heads, c.value_width),
        log_gamma=jnp.asarray(GATES[gates](rng, (c.heads,) if c.fixed else (*tokens, c.heads)), jnp.float32),
        initial_state=normal(*state, dtype=jnp.float32) if c.state else None,
        segment_ids=jnp.asarray(SEGMENTS[segments](rng, tokens), jnp.int32) if c.segments else None,
        d_o=normal(*tokens, c.heads, c.value_width),
        d_state=normal(*state, dtype=jnp.float32),
    )


OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dlog_gamma", "dinitial_state")


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """The recurrence and its derivative, a token at a time in numpy and float64."""
    wide = inputs.wide()
    q, k, v, d_o = (wide[name] for name in ("q", "k", "v", "d_o"))
    batch, length, heads, key_width = q.shape
    scale = key_width**-0.5
    gamma = np.broadcast_to(np.exp(wide["log_gamma"]), (batch, length, heads))[..., None, None]
    keep = wide["keep"][..., None, None, None]
    update = k[..., None] * v[..., None, :]

    before, state, o = [], wide["initial_state"], np.zeros_like(d_o)
    for t in range(length):
        before.append(keep[:, t] * state)
        state = gamma[:, t] * before[t] + update[:, t]
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    out = {"o": o, "final_state": state}

    dq, dk, dv, dg = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((batch, length, heads))
    d_state = wide["d_state"]
    for t in reversed(range(length)):
        d_state = d_state + scale * q[:, t, :, :, None] * d_o[:, t, :, None]
        dq[:, t] = scale * np.einsum("bhv,bhkv->bhk", d_o[:, t], gamma[:, t] * before[t] + update[:, t])
        dk[:, t] = np.einsum("bhv,bhkv->bhk", v[:, t], d_state)
        dv[:, t] = np.einsum("bhk,bhkv->bhv", k[:, t], d_state)
        dg[:, t] = np.sum(gamma[:, t] * d_state * before[t], (-1, -2))
        d_state = keep[:, t] * gamma[:, t] * d_state
    dg = dg.sum((0, 1)) if inputs.log_gamma.ndim == 1 else dg
    out |= {"dq": dq, "dk": dk, "dv": dv, "dlog_gamma": dg}
    return out | ({"dinitial_state": d_state} if inputs.initial_state is not None else {})


check = functools.partial(against_oracle.check, oracle)


def pytest_generate_tests(metafunc):
    """One run per implementation."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(scope="session")
def suite():
    """This module, for tests to reach the above (tests are no package)."""
    return sys.modules[__name__]
