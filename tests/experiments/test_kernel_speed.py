"""The smallest run on a CPU: a row for each implementation, its numbers, and a case that fails as a row."""

import json

import jax
import pytest

import kernel_speed

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="measures the CPU's cases")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel_speed")
    names = ["--cases", "cpu_256", "--implementations", "xla,reference,mosaic_gpu", "--name", "run"]
    assert kernel_speed.main([*names, "--rounds", "1", "--results", str(folder)]) == 0
    return folder


def test_rows(folder):
    content = json.loads((folder / "run.json").read_text())
    rows = {row["implementation"]: row for row in content["rows"]}
    assert list(rows) == ["xla", "reference", "mosaic_gpu", "softmax (xla)"]
    for name in ("xla", "reference"):
        row = rows[name]
        assert row["errors"].keys() == {"o", "dq", "dk", "dv", "dlog_alpha"}
        assert max(row["errors"].values()) < 2e-5
        assert row["causal"] and row["same_bits"]
        assert row["forward_ms"] > 0 and 0 < row["both_ms"] < 1e3 * row["both_first_call_s"]
    # o, dq, dk, dv and dlog_alpha of 8 x 256 tokens, 2 heads of 32 x 32, in float32
    assert rows["xla"]["both_mib"] >= 5 * 8 * 256 * 2 * 32 * 4 / 2**20
    assert "errors" not in rows["softmax (xla)"] and rows["softmax (xla)"]["both_ms"] > 0
    assert rows["mosaic_gpu"]["error"].startswith(
        "NotImplementedError: implementation 'mosaic_gpu' cannot run this call"
    )
    assert "both_ms" not in rows["mosaic_gpu"]
    speed = content["copy_gb_per_s"] * 1e9
    assert rows["xla"]["both_floor_ms"] == pytest.approx(1e3 * 8 * 256 * 2 * 4 * (14 * 32) / speed)
    assert {"commit", "versions", "device"} <= content["ran_on"].keys()


def test_table_and_plot(folder):
    table = (folder / "run.md").read_text()
    assert "| cpu_256 (8, 256, 2, 32, 32) | xla | " in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {11}
    assert (folder / "run.png").stat().st_size > 10_000


def test_documents_and_resets(tmp_path):
    flags = ["--gates", "inf", "--packed", "3", "--implementations", "reference", "--cases", "cpu_256", "--rounds", "1"]
    assert kernel_speed.main([*flags, "--results", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "cpu-inf-3.json").read_text())["rows"]
    assert max(row["errors"].values()) < 2e-5 and row["causal"]


MISTAKES = {
    ("--cases", "fig3"): "error: --cases: fig3 is not one of cpu_256,",
    ("--cases", "cpu_256", "--packed", "300"): "error: --packed 300: give from 1 to 256 documents for cpu_256",
    ("--implementations", "cuda"): "error: --implementations: cuda is not one of ",
    ("--peers", "torch"): "error: --peers: torch is not one of jla, fla",
    ("--rounds", "0"): "error: --rounds 0: give at least 1",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line(flags, capsys, tmp_path):
    assert kernel_speed.main([*flags, "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(MISTAKES[flags]) and said.count("\n") == 1
