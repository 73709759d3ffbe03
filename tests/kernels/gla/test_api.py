"""Checks, defaults and the choice of implementation."""

import functools
import importlib.util
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.gla
from kernels import gated_linear_attention, gated_linear_attention_step
from kernels.gla import api


def shapes(batch=2, length=8, heads=4, groups=2, key_width=3, value_width=5, dtype=jnp.float32):
    keys = (groups, key_width)
    last = {"q": (heads, key_width), "k": keys, "v": (groups, value_width), "log_alpha": keys}
    return {name: jnp.zeros((batch, length, *axes), dtype) for name, axes in last.items()}


MISTAKES = {
    "no array": ({"k": None}, "k: got a NoneType, wanted an array [B=2, T=8, G, K=3]"),
    "rank": ({"q": jnp.zeros((8, 4, 3))}, "q: got shape (8, 4, 3), wanted [B, T, H, K]"),
    "length": ({"k": jnp.zeros((2, 7, 2, 3))}, "k: got shape (2, 7, 2, 3), wanted [B=2, T=8, G, K=3]"),
    "groups": ({"v": jnp.zeros((2, 8, 4, 5))}, "v: got shape (2, 8, 4, 5), wanted [B=2, T=8, G=2, V]"),
    "heads": ({"q": jnp.zeros((2, 8, 3, 3))}, "q: got H=3 heads, wanted a multiple of k's G=2"),
    "empty": (
        {"v": jnp.zeros((2, 8, 2, 0))},
        "v: got shape (2, 8, 2, 0), wanted every axis of [B=2, T=8, G=2, V] to be at least 1",
    ),
    "dtype": (
        {"log_alpha": jnp.zeros((2, 8, 2, 3), int)},
        "log_alpha: got dtype int32, wanted bfloat16, float16 or float32",
    ),
    "state": (
        {"initial_state": jnp.zeros((2, 2, 3, 5))},
        "initial_state: got shape (2, 2, 3, 5), wanted [B=2, H=4, K=3, V=5]",
    ),
    "state dtype": (
        {"initial_state": jnp.zeros((2, 4, 3, 5), jnp.bfloat16)},
        "initial_state: got dtype bfloat16, wanted float32",
    ),
    "segments": ({"segment_ids": jnp.zeros((2, 9), jnp.int32)}, "segment_ids: got shape (2, 9), wanted [B=2, T=8]"),
    "segment dtype": ({"segment_ids": jnp.zeros((2, 8), jnp.uint8)}, "segment_ids: got dtype uint8, wanted int32"),
    "scale": (
        {"scale": float("nan")},
        "scale: got nan, wanted None or a finite Python number (multiply q by a traced one)",
    ),
    "name": ({"implementation": "cuda"}, "implementation: got 'cuda', wanted None or one of "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    changes, message = MISTAKES[mistake]
    arguments = shapes() | changes
    arrays = [arguments.pop(name) for name in ("q", "k", "v", "log_alpha")]
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda *x: gated_linear_attention(*x, **arguments), *arrays)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_step_are_named():
    q, k, v, state = jnp.zeros((2, 4, 3)), jnp.zeros((2, 2, 3)), jnp.zeros((2, 2, 5)), jnp.zeros((2, 4, 3, 5))
    with pytest.raises(ValueError, match=r"log_alpha_t: got shape \(2, 2\), wanted \[B=2, G=2, K=3\]"):
        gated_linear_attention_step(q, k, v, k[..., 0], state)
    with pytest.raises(ValueError, match="state: got dtype bfloat16, wanted float32"):
        gated_linear_attention_step(q, k, v, k, state.astype(jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choice depends on the platform")
def test_choice_on_cpu():
    choice = kernels.gla.choose(*shapes().values())
    assert choice.implementation == "xla"
    assert all(isinstance(reason, str) and reason for reason in choice.passed_over.values())
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes().values()]
    assert kernels.gla.choose(*structs) == choice
    with jax.enable_x64():
        choice = kernels.gla.choose(*shapes(dtype=jnp.float64).values())
    assert choice.implementation == "reference"
    assert "q is float64" in choice.passed_over["xla"]


def test_a_named_implementation_that_cannot_run_says_why():
    with jax.enable_x64(), pytest.raises(NotImplementedError, match="'xla' cannot run this call: q is float64"):
        gated_linear_attention(*shapes(dtype=jnp.float64).values(), implementation="xla")


def test_outputs_have_the_dtypes_of_the_contract():
    arrays = shapes(dtype=jnp.bfloat16) | {"v": jnp.zeros((2, 8, 2, 5), jnp.float16)}
    for name in api.IMPLEMENTATIONS:
        try:
            call = functools.partial(gated_linear_attention, return_final_state=True, implementation=name)
            o, state = jax.eval_shape(call, *arrays.values())
        except NotImplementedError:
            continue
        assert (o.shape, o.dtype) == ((2, 8, 4, 5), jnp.float16)
        assert (state.shape, state.dtype) == ((2, 4, 3, 5), jnp.float32)


def test_recurrence_in_float64_is_the_oracle(gla):
    """Its own derivative, by JAX, and the oracle's, written out, agree to float64."""
    inputs = gla.make_inputs(gla.CASES["full"], gates="wild")
    expected = gla.oracle(inputs)
    with jax.enable_x64():
        wide = [None if x is None else jnp.asarray(x, jnp.float64) for x in inputs.differentiable]

        def call(q, k, v, log_alpha, initial_state):
            options = {"initial_state": initial_state, "segment_ids": inputs.segment_ids, "return_final_state": True}
            return gated_linear_attention(q, k, v, log_alpha, **options, implementation="reference")

        outputs, vjp = jax.vjp(call, *wide)
        cotangents = jnp.asarray(inputs.d_o, jnp.float64), jnp.asarray(inputs.d_state, jnp.float64)
        for name, got in zip(gla.OUTPUTS, (*outputs, *vjp(cotangents)), strict=True):
            np.testing.assert_allclose(got, expected[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("channels", "floats", "obstacle"),
    [(64, "bfloat16", None), (256, "float16", None), (272, "bfloat16", "up to 256"), (64, "float32", "bfloat16 and")],
)
def test_hopper_kernels_are_chosen_for_what_they_take(monkeypatch, channels, floats, obstacle):
    monkeypatch.setattr("kernels.dispatch.platform_of", lambda x: "gpu")
    monkeypatch.setattr("kernels.dispatch.compute_capability", lambda: "9.0")
    here = {name: path for name, path in api.IMPLEMENTATIONS.items() if name != "triton"}  # that asks the driver
    monkeypatch.setattr(api, "IMPLEMENTATIONS", here)
    choice = kernels.gla.choose(*[jax.ShapeDtypeStruct((1, 64, 2, channels), floats)] * 4)
    assert (choice.implementation == "mosaic_gpu") == (obstacle is None)
    assert obstacle is None or obstacle in choice.passed_over["mosaic_gpu"]


def test_a_copy_under_another_name_is_on_its_own(tmp_path, monkeypatch):
    """The folder taken into another project's package finds its own implementations there."""
    shutil.copytree(Path(kernels.__file__).parent, tmp_path / "lifted" / "ops")
    monkeypatch.syspath_prepend(tmp_path)
    ops = importlib.import_module("lifted.ops")
    for operator in ("gla", "retention", "selective_scan", "gla_decode", "matvec"):
        for path in importlib.import_module(f"lifted.ops.{operator}.api").IMPLEMENTATIONS.values():
            assert path.startswith(f"lifted.ops.{operator}.")
            assert importlib.util.find_spec(path)
    assert ops.gated_linear_attention(*map(jnp.zeros, [(1, 4, 1, 2)] * 4)).shape == (1, 4, 1, 2)
