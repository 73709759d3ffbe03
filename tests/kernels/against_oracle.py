"""What the operators' suites share: running an implementation, and the check of what comes out against an oracle."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from hypothesis import HealthCheck, settings

few_examples = functools.partial(settings, suppress_health_check=[HealthCheck.function_scoped_fixture])

SEGMENTS = {
    "one": lambda rng, shape: np.full(shape, 7),
    "each token": lambda rng, shape: np.broadcast_to(np.arange(shape[1]), shape),
    "sorted": lambda rng, shape: np.sort(rng.integers(0, 4, shape)),
    "ids come back": lambda rng, shape: np.sort(rng.integers(0, 6, shape)) % 2,
}

# Relative RMS error against the oracle on the same inputs: forward, gradients.
TOLERANCES = {"float32": (5e-6, 2e-5), "bfloat16": (4e-3, 5e-3), "float16": (1e-3, 1e-3)}
FORWARD = ("o", "y", "final_state")


@functools.cache
def outputs_and_gradients(operator: Callable, implementation: str) -> Callable:
    """Outputs, then gradients of everything, the initial state last; compiled once per shape."""

    def run(differentiable, segment_ids, *cotangents):
        def call(*arrays):
            *arrays, state = arrays
            options = {"initial_state": state, "segment_ids": segment_ids, "return_final_state": True}
            return operator(*arrays, **options, implementation=implementation)

        outputs, vjp = jax.vjp(call, *differentiable)
        return *outputs, *vjp(cotangents)

    return jax.jit(run)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def check(outputs: dict, expected: dict[str, np.ndarray], uncancelled: dict[str, np.ndarray], dtype: str) -> None:
    """Relative RMS errors within the contract; zero where the oracle is zero throughout.

    ``uncancelled``: the oracle with no cancellation between terms, which rounding is relative to where numbers are few.
    """
    assert outputs.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(outputs[name], np.float64)
        assert np.isfinite(got).all(), name
        error = rms(got - want) / max(rms(want if want.size > 1000 else uncancelled[name]), 1e-30)
        limit = TOLERANCES[dtype][name not in FORWARD]
        if want.size < 100:
            limit *= 3  # of so few numbers the worst counts, not the typical one: three roundings
        assert error < limit, f"{name}: {error:.2e}, wanted under {limit}"
