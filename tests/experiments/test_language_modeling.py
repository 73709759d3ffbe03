"""The real command line: what it leaves, and one line for each bad input."""

import importlib.util
import json

import jax
import pytest

import glax.layers.gated_linear_attention as gla_layer
import language_modeling
from glax.training import ProcessConfig, process_config
from glax.training.utilization import PEAK_FLOPS
from language_modeling import main


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a tiny run on a small text."""
    monkeypatch.setenv("GLAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for index in range(30):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index} says that {index} is a number\n" * 8)
    flags = {
        "preset": "gla-tiny",
        "model.num-layers": 1,
        "runs": tmp_path / "runs",
        "name": "run",
        "data.train": tmp_path / "text",
        "data.sequence-length": 64,
        "data.batch-size": 8,
        "steps": 4,
        "optimizer.learning-rate": 0.002,
        "sample-tokens": 0,
    }
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]


def test_flags_of_processes_are_found_among_the_others():
    assert process_config([]) == ProcessConfig()
    argv = ["--steps", "4", "--processes.count", "2", "--processes.index=1", "--processes.coordinator", "host:1"]
    assert process_config(argv) == ProcessConfig(coordinator="host:1", count=2, index=1)


def test_default_command_learns(tmp_path, monkeypatch, capfd):
    """The command without arguments, at a twentieth of its steps: bits per byte fall, and the run folder is whole."""
    monkeypatch.setenv("GLAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "20", "--data.batch-size", "8", "--data.validation-tokens", "3000", "--sample-tokens", "20"]
    assert main(short) == 0
    said = capfd.readouterr().out
    folder = tmp_path / "runs" / "gla-small-bytes"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bits = [record["validation_bits_per_byte"] for record in records if "validation_bits_per_byte" in record]
    assert 7.5 < bits[0] < 8.6, "an untrained model knows nothing of 257 symbols"
    assert bits[-1] < 0.7 * bits[0]
    assert f"{bits[0]:.4f} at the start, {bits[-1]:.4f} at the end" in said
    assert "sample, after the prompt" in said and "waiting for data" in said
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert set(steps[0]) >= {"learning_rate", "grad_norm", "tokens_per_second", "data_wait", "skipped_steps"}
    assert (folder / "loss.png").exists() and (folder / "config.json").exists()
    assert (folder / "checkpoints" / "20").is_dir()

    content = (folder / "metrics.jsonl").read_bytes()
    assert main(short) == 0
    assert "is complete: 20 steps" in capfd.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == content


def test_help_names_presets_and_shows_their_values(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "gla-340m", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for text in ("gla-1.3b", "--mesh.fsdp", "--data.train", "28610", "954", "--implementation"):
        assert text in said


def test_options_reach_the_run(tiny, tmp_path, monkeypatch, capfd):
    """The named kernel runs, in as many microbatches as asked for; profile, TensorBoard events and MFU are left."""
    pytest.importorskip("tensorboard")
    operator, seen = gla_layer.gated_linear_attention, []

    def watched(q, *operands, implementation, **options):
        seen.append((implementation, q.shape[0]))
        return operator(q, *operands, implementation=implementation, **options)

    monkeypatch.setattr(gla_layer, "gated_linear_attention", watched)
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 1e12)
    options = ["--implementation", "reference", "--microbatches", "2", "--profile", "--tensorboard"]
    assert main([*tiny, *options, "--data.batch-size", "16"]) == 0
    assert set(seen) == {("reference", 8 // jax.device_count())}  # a microbatch of 8 rows, shared out over the devices
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "config.json").read_text())["model"]["implementation"] == "reference"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    model = language_modeling.parse([*tiny, *options]).train.model
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * model.flops_per_token(64) / 8e12)
    assert "MFU" in capfd.readouterr().out
    assert list((folder / "profile").rglob("*.xplane.pb")) and list((folder / "tensorboard").iterdir())


BAD_INPUT = {
    "no such data": (["--data.train", "nowhere"], "nowhere"),
    "an empty data folder": (["--data.train", "{tmp}/empty"], "empty"),
    "data that is not UTF-8": (["--data.train", "{tmp}/latin.txt"], "latin.txt"),
    "a tokenizer larger than the vocabulary": (["--model.vocab-size", "100"], "257 tokens"),
    "no such tokenizer": (["--data.tokenizer", "nothing"], 'unknown tokenizer "nothing"'),
    "a mesh that does not divide the devices": (["--mesh.fsdp", "3"], "does not divide the 8 devices"),
    "a mesh larger than the devices": (["--mesh.data", "16"], "needs 16 devices and there are 8"),
    "a mesh that does not divide the heads": (["--mesh.tensor", "8"], "does not divide the model's 2 heads"),
    "a mesh that does not divide the batch": (["--data.batch-size", "12"], "not a multiple of mesh.data 8"),
    "microbatches that do not divide the batch": (["--microbatches", "3"], "microbatches 3"),
    "a sequence longer than the data": (["--data.sequence-length", "1000000"], "fewer than one sequence of 1000000"),
    "an absent extra": (["--wandb"], 'pip install "glax[loggers]"'),
    "an unknown preset": (["--preset", "gla-9000b"], 'unknown preset "gla-9000b"'),
    "a kernel that cannot run here": (["--implementation", "mosaic_gpu"], "cannot be trained here"),
    "no steps": (["--steps", "0"], "steps is 0"),
    "a temperature that draws nothing": (["--temperature", "-1"], "temperature is -1.0"),
    "a run folder that is a file": (["--runs", "{tmp}", "--name", "latin.txt"], "not a folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, tiny, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1") * 1000)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    arguments, said = BAD_INPUT[case]
    assert main([*tiny, *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capfd.readouterr().err
    assert [line for line in error.splitlines() if line.startswith("error: ")] == error.splitlines()[-1:]
    assert said in error
    assert not (tmp_path / "runs").exists(), "nothing is written for a run that cannot start"


def test_a_run_of_another_config_is_kept(tiny, tmp_path, capfd):
    tiny += ["--implementation", "reference"]  # compiles fastest
    assert main(tiny) == 0
    before = {path: path.read_bytes() for path in tmp_path.joinpath("runs").rglob("*") if path.is_file()}
    assert main([*tiny, "--optimizer.learning-rate", "1", "--seed", "7"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "optimizer.learning_rate is 0.002 there and 1.0 here; seed is 0 there and 7 here" in error
    assert before == {path: path.read_bytes() for path in tmp_path.joinpath("runs").rglob("*") if path.is_file()}
