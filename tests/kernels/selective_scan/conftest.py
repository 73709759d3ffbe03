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
    channels: int
    states: int
    segments: bool
    state: bool


CASES = {
    "token": Case(1, 1, 1, 1, segments=False, state=True),
    "plain": Case(1, 100, 5, 16, segments=False, state=False),
    "full": Case(2, 70, 6, 4, segments=True, state=True),
}

STEPS = {
    "mamba": lambda rng, shape: np.logaddexp(0, rng.normal(size=shape) - 4),
    "large": lambda rng, shape: rng.uniform(0, 60, shape),
    "wild": lambda rng, shape: np.where(rng.random(shape) < 0.1, 1e4, np.exp(3 * rng.normal(size=shape) - 3)),
    "zero": lambda rng, shape: np.zeros(shape),
}


@dataclasses.dataclass
class Inputs(against_oracle.Inputs):
    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    initial_state: jax.Array | None
    segment_ids: jax.Array | None
    d_y: jax.Array
    d_state: jax.Array

    DECAYS = ("dt", "A")


def make_inputs(case, seed=0, steps="mamba", segments="sorted", dtype="float32") -> Inputs:
    rng = np.random.default_rng(seed)
    c = case
    tokens, state = (c.batch, c.length), (c.batch, c.channels, c.states)
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return Inputs(
        x=normal(*tokens, c.channels),
        dt=jnp.asarray(STEPS[steps](rng, (*tokens, c.channels)), dtype),
        A=-jnp.asarray(rng.uniform(0.5, c.states + 0.5, (c.channels, c.states)), jnp.float32),
        B=normal(*tokens, c.states),
        C=normal(*tokens, c.states),
        D=normal(c.channels, dtype=jnp.float32),
        initial_state=normal(*state, dtype=jnp.float32) if c.state else None,
        segment_ids=jnp.asarray(SEGMENTS[segments](rng, tokens), jnp.int32) if c.segments else None,
        d_y=normal(*tokens, c.channels),
        d_state=normal(*state, dtype=jnp.float32),
    )


OUTPUTS = ("y", "final_state", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial_state")


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """The recurrence and its derivative, a token at a time in numpy and float64."""
    wide = inputs.wide()
    x, dt, A, B, C, D, d_y = (wide[name] for name in ("x", "dt", "A", "B", "C", "D", "d_y"))
    length = x.shape[1]
    keep = wide["keep"][..., None, None]
    decay = np.exp(dt[..., None] * A)
    update = (dt * x)[..., None] * B[:, :, None]

    before, state, y = [], wide["initial_state"], np.zeros_like(x)
    for t in range(length):
        before.append(keep[:, t] * state)
        state = decay[:, t] * before[t] + update[:, t]
        y[:, t] = np.sum(C[:, t, None] * state, -1) + D * x[:, t]
    out = {"y": y, "final_state": state}

    dx, ddt, dA, dB, dC = (np.zeros_like(array) for array in (x, dt, A, B, C))
    g = wide["d_state"]
    for t in reversed(range(length)):
        g = g + d_y[:, t, :, None] * C[:, t, None]
        dC[:, t] = np.sum(d_y[:, t, :, None] * (decay[:, t] * before[t] + update[:, t]), 1)
        dB[:, t] = np.sum((dt[:, t] * x[:, t])[..., None] * g, 1)
        d_input = np.sum(g * B[:, t, None], -1)
        d_exponent = g * decay[:, t] * before[t]
        dx[:, t] = dt[:, t] * d_input + D * d_y[:, t]
        ddt[:, t] = x[:, t] * d_input + np.sum(d_exponent * A, -1)
        dA += np.sum(dt[:, t, :, None] * d_exponent, 0)
        g = keep[:, t] * decay[:, t] * g
    out |= {"dx": dx, "ddt": ddt, "dA": dA, "dB": dB, "dC": dC, "dD": np.sum(x * d_y, (0, 1))}
    return out | ({"dinitial_state": g} if inputs.initial_state is not None else {})


check = functools.partial(against_oracle.check, oracle)


def pytest_generate_tests(metafunc):
    """One run per implementation."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(scope="session")
def scan():
    """This module, for tests to reach the above (tests are no package)."""
    return sys.modules[__name__]
