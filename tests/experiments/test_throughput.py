"""Throughput of small models: rows add up, and what cannot run is a row that says so."""

import json

import jax
import numpy as np
import pytest

import throughput
from glax.models import PRESETS
from glax.training.utilization import PEAK_FLOPS
from step_profile import SCOPES, profile_by_part, scopes_of
from throughput import Case, main, prepare


def test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    command = ["--models", "gla-tiny,retnet-tiny", "--shapes", "32x2", "--implementations", "fastest,mosaic_gpu"]
    command += ["--steps", "2", "--parts", "--results", str(tmp_path)]
    assert main(command) == 0
    content = json.loads((tmp_path / "throughput.json").read_text())
    rows = {(row["model"], row["implementation"]): row for row in content["rows"]}
    assert len(rows) == 4
    for model in ("gla-tiny", "retnet-tiny"):
        row = rows[model, "fastest"]
        assert row["tokens_per_second"] == pytest.approx(64 / (row["step_ms"] / 1e3), rel=1e-3)
        flops = PRESETS[model].flops_per_token(32)
        assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 1e12, abs=1e-4)
        # Parameters, two moments and as many gradients at the least.
        assert row["peak_gib"] * 2**30 >= 3.9 * 4 * row["parameters"]
        assert row["parts_ms"].keys() == {"operator", "mixer", "mlp", "block", "loss", "optimizer"}
        assert min(row["parts_ms"].values()) > 0
    assert "implementation 'mosaic_gpu' cannot run this call" in rows["gla-tiny", "mosaic_gpu"]["error"]
    assert (tmp_path / "throughput.png").exists()

    said = capsys.readouterr().out
    monkeypatch.setattr(throughput, "prepare", None)  # a second start measures nothing
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0] == said.splitlines()[0]


def test_meshes(tmp_path, monkeypatch):
    """A mesh takes the steps that one device takes, and is measured by all its devices; older rows are of one."""
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    command = ["--models", "gla-tiny", "--shapes", "32x4", "--steps", "2", "--results", str(tmp_path)]
    assert main([*command, "--meshes", "1,data2xtensor2"]) == 0
    file = tmp_path / "throughput.json"
    content = json.loads(file.read_text())
    one, sharded = content["rows"]
    assert sharded["mesh"] == "data2xtensor2"
    each = sharded["tokens_per_second_per_device"]
    assert each == pytest.approx(sharded["tokens_per_second"] / 4, rel=1e-3)
    assert sharded["mfu"] == pytest.approx(PRESETS["gla-tiny"].flops_per_token(32) * each / 1e12, abs=1e-4)
    assert sharded["peak_gib"] < one["peak_gib"]
    np.testing.assert_allclose(sharded["first_losses_and_grad_norms"], one["first_losses_and_grad_norms"], rtol=1e-5)

    content["rows"] = [{name: value for name, value in one.items() if name != "mesh"}]
    file.write_text(json.dumps(content))
    monkeypatch.setattr(throughput, "prepare", None)
    assert main(command) == 0


def test_profile_adds_up_by_part():
    """Every part has instructions in a compiled step, and kernels add up to parts whatever they are called."""
    scopes = scopes_of(prepare(Case("gla-tiny", "32x2", "fastest", "none"), None).step.as_text())
    assert set(scopes.values()) == {*SCOPES, "rest"}
    one = {scope: next(name for name, found in scopes.items() if found == scope) for scope in SCOPES}
    times = {("gemm", one["mlp"]): [2.0, 24.0], ("gemm", one["mixer"]): [1.5, 24.0], ("copy", "no such"): [0.25, 1.0]}
    profile = profile_by_part(times, scopes, count=1)
    assert profile["profile_ms"] == {"mlp": [2.0, 24.0], "mixer": [1.5, 24.0], "rest": [0.25, 1.0]}
    assert profile["kernels_ms"] == {"gemm": [3.5, 48.0], "all others": [0.25, 1.0]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "gla-9b"], 'models has "gla-9b": choose from gla-340m'),
        (
            ["--models", "gla-tiny", "--meshes", "data2xdata2"],
            'meshes has "data2xdata2": give 1, or axes of data, fsdp',
        ),
        (["--models", "gla-tiny", "--meshes", "fsdp16"], "the mesh fsdp 16 x data 1 needs 16 devices and there are 8"),
        (["--models", "gla-tiny", "--shapes", "2048"], 'shapes has "2048": give LENGTHxBATCH'),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
