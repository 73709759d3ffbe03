"""The glax command from a text to a score."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from glax import cli


@pytest.fixture(scope="module")
def run_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    arguments = f"train --preset gla-tiny --runs {folder} --name one --steps 4 --model.num-layers 1"
    arguments += f" --data.sequence-length 64 --data.batch-size 8 --data.train {text_folder / 'train'}"
    arguments += f" --data.cache {folder / 'cache'} --model.implementation reference"  # compiles fastest
    assert cli.main(arguments.split()) == 0
    return folder / "one"


def test_from_a_run_to_a_checkpoint_and_its_perplexity(run_folder: Path, text_folder: Path, tmp_path: Path, capsys):
    """A run generates and is scored; so is the checkpoint written from it, to the same number."""
    common = ["--max-new-tokens", "5", "--temperature", "0"]
    assert cli.main(["generate", str(run_folder), "--prompt", "the cat", *common]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the cat") and len(text) > len("the cat\n")
    assert cli.main(["convert", str(run_folder), str(tmp_path / "hub")]) == 0
    files = str(text_folder / "validation")
    scores = []
    for source, extra in ((run_folder, []), (tmp_path / "hub", ["--tokenizer", "bytes"])):
        path = tmp_path / "scores.json"
        assert cli.main(["evaluate", str(source), "--text", files, "--json", str(path), "--segment", "64", *extra]) == 0
        scores.append(json.loads(path.read_text())["perplexity"]["token_perplexity"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    state = str(tmp_path / "state")
    assert cli.main(["generate", str(run_folder), "--read", f"{files}/00.txt", "--save-state", state]) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(run_folder), "--state", state, "--prompt", "a", "b", *common]) == 0
    assert capsys.readouterr().out.startswith("--- a")


def test_help_and_errors(run_folder: Path, text_folder: Path, tmp_path: Path, capsys):
    tokenizer = tmp_path / "larger.model"
    with tokenizer.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(text_folder / "train" / "00.txt")],
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,  # 256 pieces of them
            hard_vocab_limit=False,
            minloglevel=2,
        )
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command}" in usage
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"glax {command}" in capsys.readouterr().out
    for arguments, message in {
        "fly": '"fly" is no command',
        f"generate {tmp_path / 'absent'} --prompt x": "is no folder",
        f"generate {tmp_path} --prompt x": "config.json",
        f"generate {run_folder} --prompt x --temperature -1": "temperature is -1.0",
        f"generate {run_folder} --prompt x --save-state {tmp_path / 's'}": "give a text file to read",
        f"generate {run_folder} --read {__file__} --save-state {tmp_path / 'no' / 's'}": "is no place for a file",
        f"generate {run_folder} --prompt x --seed 99999999999": "seed is 99999999999",
        f"generate {run_folder} --prompt \udcff": "not UTF-8",
        f"generate {run_folder} --prompt x --implementation mosaic_gpu": "'mosaic_gpu' cannot run this call",
        f"evaluate {run_folder} --text {__file__} --tokenizer {tokenizer}": "the model's vocabulary is 264",
        f"evaluate {run_folder} --text {__file__} --json {tmp_path / 'no' / 's'}": "is no place for a file",
        f"convert {run_folder} {tmp_path / 'h'} --max-shard-gb nan": "max_shard_gb is nan",
        f"convert {run_folder} {run_folder}": "is the folder of a run",
        "train --preset gla-tiny --mesh auto --mesh.fsdp 2": "mesh.auto chooses every axis",
        "train --processes.index 1": "give all three",
        f"evaluate {run_folder}": "there is nothing to evaluate",
        f"convert {run_folder} {tmp_path / 'h'} --kind llama": "llama format",
    }.items():
        assert cli.main(arguments.split()) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_reader_of_the_output_that_leaves():
    """As ``head`` does: no traceback, and no word at exit either."""
    code = "import sys, glax.errors as e; sys.exit(e.exit_code(lambda: [print('x' * 99) for _ in range(10**5)]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
