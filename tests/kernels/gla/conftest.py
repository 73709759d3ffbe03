"""What the shared suite runs on: the implementations, the cases, and a float64 oracle that shares no code with them."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import against_oracle
from against_oracle import SEGMENTS


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A name that `implementation=` takes, the input dtypes it is held to, and the cases (of CASES) it supports."""

    name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    cases: tuple[str, ...] = ("token", "tiny", "plain", "full")


IMPLEMENTATIONS = [Implementation("reference"), Implementation("xla")]
if jax.default_backend() == "gpu" and importlib.util.find_spec("jax_triton"):
    IMPLEMENTATIONS.append(Implementation("triton"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes are few and fixed, so that each compiles once; everything else is drawn."""

    batch: int
    length: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    segments: bool
    state: bool


CASES = {
    "token": Case(1, 1, 1, 1, 1, 1, segments=False, state=True),
    "tiny": Case(2, 5, 2, 1, 1, 3, segments=True, state=False),
    "plain": Case(1, 300, 2, 2, 16, 8, segments=False, state=False),
    "full": Case(2, 130, 4, 2, 8, 16, segments=True, state=True),
}

GATES = {
    "mild": lambda rng, shape: -np.logaddexp(0, -rng.normal(size=shape)) / 16,
    "unscaled": lambda rng, shape: -np.logaddexp(0, -rng.normal(size=shape)),
    "strong": lambda rng, shape: rng.uniform(-60, 0, shape),
    "resets": lambda rng, shape: np.where(rng.random(shape) < 0.2, -np.inf, -rng.exponential(size=shape) / 4),
    "wild": lambda rng, shape: np.where(rng.random(shape) < 0.05, -np.inf, -np.exp(3 * rng.normal(size=shape) - 1)),
    "zero": lambda rng, shape: np.zeros(shape),
    "none pass": lambda rng, shape: np.full(shape, -np.inf),
}


@dataclasses.dataclass
class Inputs(against_oracle.Inputs):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_alpha: jax.Array
    initial_state: jax.Array | None
    segment_ids: jax.Array | None
    d_o: jax.Array
    d_state: jax.Array

    DECAYS = ("log_alpha",)


def make_inputs(case, seed=0, gates="mild", segments="sorted", dtype="float32", gate_dtype=None) -> Inputs:
    rng = np.random.default_rng(seed)
    c = case
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    log_alpha = GATES[gates](rng, (c.batch, c.length, c.groups, c.key_width))
    log_alpha = jnp.asarray(np.where(log_alpha < -6e4, -np.inf, log_alpha), gate_dtype or dtype)  # float16 ends there
    state = (c.batch, c.heads, c.key_width, c.value_width)
    return Inputs(
        q=normal(c.batch, c.length, c.heads, c.key_width),
        k=normal(c.batch, c.length, c.groups, c.key_width),
        v=normal(c.batch, c.length, c.groups, c.value_width),
        log_alpha=log_alpha,
        initial_state=jnp.asarray(rng.normal(size=state), jnp.float32) if c.state else None,
        segment_ids=jnp.asarray(SEGMENTS[segments](rng, (c.batch, c.length)), jnp.int32) if c.segments else None,
        d_o=normal(c.batch, c.length, c.heads, c.value_width),
        d_state=jnp.asarray(rng.normal(size=state), jnp.float32),
    )


OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dlog_alpha", "dinitial_state")


def oracle(inputs: Inputs, scale=None) -> dict[str, np.ndarray]:
    """Eq. 3 and its derivative, a token at a time in numpy and float64."""
    wide = inputs.wide()
    q, d_o = wide["q"], wide["d_o"]
    batch, length, heads, key_width = q.shape
    ratio = heads // wide["k"].shape[2]
    scale = key_width**-0.5 if scale is None else scale
    k, v, alpha = (np.repeat(x, ratio, 2) for x in (wide["k"], wide["v"], np.exp(wide["log_alpha"])))
    keep = wide["keep"][..., None, None, None]

    before, state, o = [], wide["initial_state"], np.zeros_like(d_o)
    for t in range(length):
        before.append(keep[:, t] * state)
        state = alpha[:, t, :, :, None] * before[t] + k[:, t, :, :, None] * v[:, t, :, None]
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    out = {"o": o, "final_state": state}

    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, alpha))
    d_state = wide["d_state"]
    for t in reversed(range(length)):
        after = alpha[:, t, :, :, None] * before[t] + k[:, t, :, :, None] * v[:, t, :, None]
        d_state = d_state + scale * q[:, t, :, :, None] * d_o[:, t, :, None]
        dq[:, t] = scale * np.einsum("bhv,bhkv->bhk", d_o[:, t], after)
        dk[:, t] = np.einsum("bhv,bhkv->bhk", v[:, t], d_state)
        dv[:, t] = np.einsum("bhk,bhkv->bhv", k[:, t], d_state)
        dg[:, t] = alpha[:, t] * np.sum(d_state * before[t], -1)
        d_state = keep[:, t] * alpha[:, t, :, :, None] * d_state
    dk, dv, dg = (x.reshape(batch, length, -1, ratio, x.shape[-1]).sum(3) for x in (dk, dv, dg))
    out |= {"dq": dq, "dk": dk, "dv": dv, "dlog_alpha": dg}
    return out | ({"dinitial_state": d_state} if inputs.initial_state is not None else {})


check = functools.partial(against_oracle.check, oracle)


def pytest_generate_tests(metafunc):
    """One run per implementation, and per dtype where a test asks for one."""
    if "dtype" in metafunc.fixturenames:
        pairs = [(i, dtype) for i in IMPLEMENTATIONS for dtype in i.dtypes]
        metafunc.parametrize("implementation, dtype", pairs, ids=[f"{i.name}-{dtype}" for i, dtype in pairs])
    elif "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", IMPLEMENTATIONS, ids=[i.name for i in IMPLEMENTATIONS])


@pytest.fixture(scope="session")
def gla():
    """This module, for tests to reach the above (tests are no package)."""
    import sys

    return sys.modules[__name__]
