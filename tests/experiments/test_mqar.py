"""The examples have the properties that the task is made of, and the smallest sweep learns, stops and resumes."""

import json

import jax
import numpy as np
import pytest

import mqar
from mqar import main
from mqar_examples import TASKS, Examples, Task, examples

WIDE = Task(vocabulary=64, length=40, pairs=4, batch=8, steps=1)


@pytest.fixture(scope="module", params=[WIDE, TASKS["l256"], TASKS["l512"]], ids=["small", "l256", "l512"])
def drawn(request) -> tuple[Task, Examples]:
    return request.param, jax.tree.map(np.asarray, examples(3, 64, request.param))


def test_context_lists_distinct_keys_and_values(drawn):
    task, (tokens, _, answers) = drawn
    context = tokens[:, : 2 * task.pairs]
    keys, values = context[:, ::2], context[:, 1::2]
    assert tokens.shape == (64, task.length)
    assert keys.min() >= 1 and keys.max() < task.vocabulary // 2
    assert values.min() >= task.vocabulary // 2 and values.max() < task.vocabulary
    for row in (*keys, *values):
        assert len(set(row)) == task.pairs
    np.testing.assert_array_equal(answers, values)
    assert len(np.unique(keys, axis=0)) == 64, "rows differ"


def test_each_key_is_asked_once_at_an_even_offset_and_nothing_else_is_there(drawn):
    task, (tokens, places, answers) = drawn
    rest = tokens[:, 2 * task.pairs :]
    for row, row_places, row_rest in zip(tokens, places, rest, strict=True):
        offsets = row_places - 2 * task.pairs
        assert np.all(offsets % 2 == 0) and offsets.min() >= 0 and row_places.max() < task.length
        assert len(set(offsets)) == task.pairs
        np.testing.assert_array_equal(row[row_places], row[: 2 * task.pairs : 2])
        assert np.count_nonzero(row_rest) == task.pairs
    for row_rest, row_answers in zip(rest, answers, strict=True):
        assert not set(row_rest) & set(row_answers), "answers never appear in the input"


def test_gaps_follow_the_power_law():
    """With one pair the gap's distribution is p itself; all keys, values and gaps occur."""
    task = Task(vocabulary=16, length=22, pairs=1, batch=1, steps=1)
    tokens, places, answers = jax.tree.map(np.asarray, examples(0, 32_768, task))
    frequencies = np.bincount((places[:, 0] - 2) // 2, minlength=10) / 32_768
    weights = np.arange(1, 11) ** -0.99
    np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=0.008)
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=8)[1:] / 32_768, 1 / 7, atol=0.01)
    np.testing.assert_allclose(np.bincount(answers[:, 0], minlength=16)[8:] / 32_768, 1 / 8, atol=0.01)


def test_examples_depend_on_the_seed_alone():
    first, again, other = (examples(seed, 16, WIDE).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


def test_a_small_sweep_learns_and_resumes(tmp_path, capsys):
    """Recall goes from one answer in three, a guess among the values there, to most; a second start trains nothing."""
    command = ["--results", str(tmp_path), "--convolution", "--layers", "1", "--steps", "400"]
    command += ["--implementation", "reference"]  # compiles fastest
    assert main(command) == 0
    content = json.loads((tmp_path / "mqar.json").read_text())
    [row] = content["rows"]
    assert row["model"] == "gla" and row["best_learning_rate"] == 2e-3 and row["finished"]
    assert row["curve"][0]["accuracy"][0][0] < 0.6 and row["best_accuracy"] > 0.65
    assert {"commit", "versions", "device"} <= content["ran_on"][row["ran_on"]].keys()
    assert (tmp_path / "mqar.png").exists() and not list(tmp_path.glob("*.npz"))
    said = capsys.readouterr().out
    assert "step 100/400" in said

    assert main(command) == 0
    assert "step 100/400" not in capsys.readouterr().out
    assert json.loads((tmp_path / "mqar.json").read_text())["rows"] == content["rows"]
    assert main([*command, "--seeds", "2"]) == 2
    assert "seeds is 1 there and 2 here" in capsys.readouterr().err


def test_a_curriculum_keeps_the_tokens_of_a_step():
    task, arguments = TASKS["l256"], mqar.Arguments(curriculum="16:0.1,4:0.2")
    stages = mqar.curriculum(task, arguments)
    assert [(stage.length, stage.pairs, stage.batch) for stage, _ in stages] == [
        (16, 1, 4096),
        (64, 4, 1024),
        (256, 16, 256),
    ]
    assert [share for _, share in stages] == pytest.approx([0.1, 0.3, 1.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "steps, batch, seeds and evaluate_every must be at least 1"),
        (["--models", "gla,lstm"], 'models has "lstm": choose from gla, retnet'),
        (["--widths", "wide"], 'widths is "wide"'),
        (["--widths", "33"], "whole multiple of num_heads 2"),
        (["--curriculum", "2"], 'curriculum has "2": write TIMES:SHARE'),
        (["--curriculum", "2:0.5"], 'curriculum has "2:0.5": TIMES divides length and pairs'),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()
