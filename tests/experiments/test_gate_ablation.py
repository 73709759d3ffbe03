"""The smallest ablation: its models differ by the gate alone, learn, and leave what the plot shows."""

import json

import numpy as np
import pytest

from gate_ablation import PAPER, VARIANTS, Arguments, main, model_config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(3):
        (folder / f"{index}.txt").write_text("the cat sees the dog and the dog sees the cat. " * 120)
    return folder


def test_variants_have_the_same_parameters_within_two_percent():
    sizes = [model_config(variant, Arguments(width=256, layers=4)).num_parameters() for variant in VARIANTS]
    assert max(sizes) < 1.02 * min(sizes) and set(VARIANTS) == set(PAPER)


def test_rows(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLAX_CACHE", str(tmp_path / "cache"))
    command = ["--data", str(text), "--variants", "channel,none", "--width", "32", "--layers", "1", "--length", "32"]
    command += ["--batch", "4", "--steps", "40", "--seeds", "2", "--results", str(tmp_path)]
    command += ["--implementation", "reference"]  # compiles fastest
    assert main(command) == 0
    content = json.loads((tmp_path / "gate_ablation.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == ["channel", "none"]
    for row in rows.values():
        assert row["tokens"] == 40 * 4 * 32 and len(row["training_loss"]) == 40
        assert row["training_loss"][0] == pytest.approx(np.log(264), abs=0.2), "an untrained model knows nothing"
        for kind in ("training_perplexity", "held_out_perplexity"):
            assert len(set(row[kind])) == 2 and all(1 < value < 12 for value in row[kind])
    assert content["settings"]["text"] == text.name and content["ran_on"][0]["versions"]["jax"]
    assert (tmp_path / "gate_ablation.png").exists() and not list(tmp_path.glob("*.npz"))
    said = capsys.readouterr().out
    assert "channel: step 40/40" in said and "23.21" in said
    assert main(command) == 0
    assert "step 40/40" not in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--variants", "channel,open"], 'variants has "open": choose from channel, scalar'),
        (["--steps", "0"], "steps, seeds, length and batch must be at least 1"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
        (["--results", "/dev/null/results"], "cannot write /dev/null/results"),
    ):
        assert main(["--results", str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
