"""Killed anywhere and started again with the same command, a run has the losses of an unbroken one, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from glax.training import train
from glax.training.metrics import read_metrics

SCRIPT = Path(__file__).parents[2] / "experiments" / "language_modeling.py"

# Runs the script, and kills its own process at a file operation (`os.mkdir`, `os.rename`) whose argument ends as said,
# or when the metrics.jsonl given has reached the step given.
DRIVER = """
import os, runpy, signal, sys, threading, time
script, event, what = sys.argv[1:4]
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, os.path.dirname(script))

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def hook(name, arguments):
    if name == event and any(str(argument).endswith(what) for argument in arguments):
        kill()

def watch():
    while True:
        try:
            if f'"step": {what},' in open(event).read():
                kill()
        except FileNotFoundError:
            pass
        time.sleep(0.001)

if event.startswith("os."):
    sys.addaudithook(hook)
elif event != "none":
    threading.Thread(target=watch, daemon=True).start()
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def start(text_folder, tmp_path):
    """``start(name, event, what)``: one start of a run of twelve steps on one device; a finished process."""

    def run(name: str, event: str = "none", what: str = "") -> subprocess.CompletedProcess:
        flags = {
            "preset": "gla-tiny",
            "name": name,
            "runs": tmp_path,
            "data.train": text_folder / "train",
            "data.validation": text_folder / "validation",
            "data.cache": tmp_path / "cache",
            "data.sequence-length": 64,
            "data.batch-size": 4,
            "steps": 12,
            "evaluate-every": 3,
            "checkpoint-every": 4,
            "log-every": 1,
            "sample-tokens": 0,
        }
        arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        return subprocess.run(
            [sys.executable, "-c", DRIVER, str(SCRIPT), event, what, *arguments],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def losses(path: Path) -> list[tuple]:
    """What must not depend on kills: every number of metrics.jsonl that is no time."""
    times = {"seconds", "tokens_per_second", "data_wait"}
    return [tuple((k, v) for k, v in record.items() if k not in times) for record in read_metrics(path)]


def test_killed_in_steps_and_saves(start, tmp_path):
    """One run folder, killed as a save begins, within a step, and as a save is about to be named; then left alone."""
    unbroken = start("unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    expected = losses(tmp_path / "unbroken" / "metrics.jsonl")
    assert [dict(record)["step"] for record in expected if "loss" in dict(record)] == list(range(1, 13))

    metrics = tmp_path / "broken" / "metrics.jsonl"
    checkpoints = tmp_path / "broken" / "checkpoints"
    kills = [
        ("os.mkdir", "4.orbax-checkpoint-tmp", "compiled"),
        (str(metrics), "6", "compiled"),
        ("os.rename", "8.orbax-checkpoint-tmp", "continuing after step 4"),
    ]
    for event, what, said in kills:
        killed = start("broken", event, what)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert said in killed.stdout
        assert (metrics.parent / "config.json").exists()
    assert (checkpoints / "8.orbax-checkpoint-tmp").exists(), "killed after the files were written, before the name was"
    last = start("broken")
    assert last.returncode == 0, last.stderr
    assert "continuing after step 4" in last.stdout
    assert losses(metrics) == expected
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["12", "4", "8"]


@pytest.mark.filterwarnings("ignore:coroutine 'Store:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_newest_readable_checkpoint_is_taken(tiny_config, tmp_path, capsys):
    """With the last checkpoint's arrays damaged, the run goes on from the one before to the same end."""
    config = tiny_config(steps=6, checkpoint_every=2, evaluate_every=6)
    one = jax.devices()[:1]
    before = train(config, tmp_path / "run", devices=one, quiet=True)
    expected = losses(tmp_path / "run" / "metrics.jsonl")
    for path in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    after = train(config, tmp_path / "run", devices=one, quiet=True)
    assert "checkpoint 6 cannot be read" in capsys.readouterr().out
    assert (tmp_path / "run" / "unreadable" / "6").is_dir()
    assert not after.already_complete
    assert losses(tmp_path / "run" / "metrics.jsonl") == expected
    from flax import nnx

    jax.tree.map(np.testing.assert_array_equal, nnx.state(after.model), nnx.state(before.model))


def test_a_checkpoint_is_a_copy(tiny_config, tmp_path):
    """Steps taken while a save is under way, into the buffers that the saved state gave up, do not reach the file."""
    from glax.data import prepare, train_batches
    from glax.training.checkpoints import Checkpoints
    from glax.training.loop import plan_and_trace
    from glax.training.sharding import make_mesh, place_batch, use_mesh

    config = tiny_config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batches = train_batches(prepare(config.data, quiet=True), config.data)
    with use_mesh(mesh), Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        plan, step = plan_and_trace(config, mesh, 1)
        step = step.compile()
        state, _ = step(plan.initialize(), place_batch(next(batches), mesh))
        expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        checkpoints.save(1, state, batches)
        for _ in range(3):
            state, _ = step(state, place_batch(next(batches), mesh))
        checkpoints.wait()
        restored = checkpoints.restore(plan.abstract, batches)
    assert batches.get_state()["next_index"] == 1
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    batches.close()


def test_a_run_continues_on_another_mesh(tiny_config, tmp_path):
    """A checkpoint of one device is read in eight pieces; the losses go on to within rounding."""
    from glax.training import MeshConfig

    half = tiny_config(steps=20, evaluate_every=20)
    whole = train(half, tmp_path / "whole", devices=jax.devices()[:1], quiet=True)

    class Stop(Exception):
        pass

    def stop_at_ten(record):
        if record["step"] == 11:
            raise Stop

    from glax.training import journal

    with pytest.MonkeyPatch.context() as patch:
        write = journal.Journal._send
        patch.setattr(journal.Journal, "_send", lambda self, record: (stop_at_ten(record), write(self, record))[1])
        with pytest.raises(Stop):
            train(half, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    rest = train(tiny_config(steps=20, evaluate_every=20, mesh=MeshConfig(fsdp=8)), tmp_path / "run", quiet=True)
    got, want = ([r["loss"] for r in result.records if "loss" in r] for result in (rest, whole))
    assert got[:10] == want[:10]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
