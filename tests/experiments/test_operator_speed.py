"""The smallest run on a CPU: a row for each implementation, and its numbers."""

import json

import jax
import pytest

import operator_speed


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measures the CPU's case")
def test_rows(tmp_path):
    flags = ["--cases", "cpu_retention", "--rounds", "1", "--tokens-checked", "64", "--results", str(tmp_path)]
    assert operator_speed.main([*flags, "--implementations", "xla,xla fixed decays,mosaic_gpu", "--name", "run"]) == 0
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "run.json").read_text())["rows"]}
    assert max(rows["xla"]["errors"].values()) < 2e-5 and rows["xla"]["causal"] and rows["xla"]["same_bits"]
    assert rows["xla"]["both_ms"] > 0 and rows["xla fixed decays"]["both_ms"] > 0
    assert rows["xla fixed decays"]["both_mib"] < rows["xla"]["both_mib"]  # nothing is kept for the decays' gradient
    assert rows["mosaic_gpu"]["error"].startswith("NotImplementedError") and "both_ms" not in rows["mosaic_gpu"]
    assert "| cpu_retention (2, 256, 2, 32, 32) | xla | " in (tmp_path / "run.md").read_text()


def test_mistakes_are_one_line(capsys):
    assert operator_speed.main(["--cases", "fig3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --cases: fig3 is not one of ") and said.count("\n") == 1
