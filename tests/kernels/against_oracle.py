"""What the operators' suites share: running an implementation, and the check of what comes out against an oracle."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

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


class Inputs:
    """Arrays of a case in the dtypes an implementation takes, and cotangents of its outputs, as a dataclass.

    Its fields: what the operator takes, in order; initial_state and segment_ids, or None; cotangents of the output and
    of the final state.
    """

    DECAYS: ClassVar[tuple[str, ...]]
    """Fields that decays are made of."""

    @property
    def differentiable(self) -> tuple[jax.Array | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:-3])

    @property
    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[-2:])

    def replace(self, **changes) -> Self:
        return dataclasses.replace(self, **changes)

    def wide(self) -> dict[str, np.ndarray]:
        """What an oracle computes with: float64, zeros for no initial state, and ``keep`` ``[B, T]`` for segment_ids:
        0 where a segment starts, else 1."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        wide = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
        if wide["initial_state"] is None:
            wide["initial_state"] = np.zeros_like(wide["d_state"])
        ids, wide["keep"] = wide.pop("segment_ids"), np.ones(self.cotangents[0].shape[:2])
        if ids is not None:
            wide["keep"][:, 1:] = ids[:, 1:] == ids[:, :-1]
        return wide

    def uncancelled(self) -> Self:
        """With no cancellation between terms: what rounding is relative to where numbers are few."""
        names = {field.name for field in dataclasses.fields(self)} - {*self.DECAYS, "segment_ids"}
        return self.replace(**{name: abs(x) for name in names if (x := getattr(self, name)) is not None})


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


def run(operator: Callable, implementation: str, names: tuple[str, ...], inputs: Inputs) -> dict[str, np.ndarray]:
    """Outputs and gradients, called ``names``."""
    arrays = outputs_and_gradients(operator, implementation)(
        inputs.differentiable, inputs.segment_ids, *inputs.cotangents
    )
    return {name: np.asarray(x) for name, x in zip(names, arrays, strict=True) if x is not None}


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def check(oracle: Callable[[Inputs], dict[str, np.ndarray]], inputs: Inputs, outputs: dict, dtype: str) -> None:
    """Relative RMS errors within the contract; zero where the oracle is zero throughout."""
    expected, uncancelled = oracle(inputs), oracle(inputs.uncancelled())
    assert outputs.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(outputs[name], np.float64)
        assert np.isfinite(got).all(), name
        error = rms(got - want) / max(rms(want if want.size > 1000 else uncancelled[name]), 1e-30)
        limit = TOLERANCES[dtype][name not in FORWARD]
        if want.size < 100:
            limit *= 3  # of so few numbers the worst counts, not the typical one: three roundings
        assert error < limit, f"{name}: {error:.2e}, wanted under {limit}"
