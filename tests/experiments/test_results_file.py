"""Where results cannot be written is told in one line, before anything is measured."""

import importlib

import jax
import pytest


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="some measure the CPU's cases")
@pytest.mark.parametrize("experiment", ["kernel_speed", "operator_speed", "decode_speed", "long_context", "soak"])
def test_no_place_for_results(experiment, capsys):
    assert importlib.import_module(experiment).main(["--results", "/dev/null/results"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: cannot write /dev/null/results") and said.err.count("\n") == 1
    assert said.out == ""
