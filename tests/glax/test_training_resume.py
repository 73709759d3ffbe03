"""Killed anywhere and started again with the same command, a run has the losses of an unbroken one, bit for bit."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from glax.data import prepare, train_batches
from glax.training import MeshConfig, train
from glax.training.checkpoints import Checkpoints
from glax.training.loop import plan_and_trace
from glax.training.metrics import read_metrics
from glax.training.sharding import make_mesh, place_batch, use_mesh

pytestmark = pytest.mark.usefixtures("programs_kept")
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
    """``start(name, event, what)``: one start of a run of sixteen steps on one device; a finished process.

    The starts share what they compile, unless they are to compile it ``anew``.
    """

    def run(name: str, event: str = "none", what: str = "", anew: bool = False) -> subprocess.CompletedProcess:
        flags = {
            "preset": "gla-tiny",
            "name": name,
            "runs": tmp_path,
            "data.train": text_folder / "train",
            "data.validation": text_folder / "validation",
            "data.cache": tmp_path / "cache",
            "model.num-layers": 1,
            "implementation": "reference",
            "data.sequence-length": 64,
            "data.batch-size": 4,
            "steps": 16,
            "evaluate-every": 6,
            "checkpoint-every": 4,
            "log-every": 1,
            "sample-tokens": 0,
        }
        arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if not anew:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            environment["JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"] = "1"  # an address: each start has its own
        return subprocess.run(
            [sys.executable, "-c", DRIVER, str(SCRIPT), event, what, *arguments],
            env=environment,
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
    assert [dict(record)["step"] for record in expected if "loss" in dict(record)] == list(range(1, 17))

    metrics = tmp_path / "broken" / "metrics.jsonl"
    checkpoints = tmp_path / "broken" / "checkpoints"
    kills = [
        ("os.mkdir", "4.orbax-checkpoint-tmp", "compiled"),
        (str(metrics), "9", "compiled"),
        ("os.rename", "12.orbax-checkpoint-tmp", "continuing after step"),
    ]
    for event, what, said in kills:
        killed = start("broken", event, what)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert said in killed.stdout
        assert (metrics.parent / "config.json").exists()
    assert (checkpoints / "12.orbax-checkpoint-tmp").exists(), "killed once the files were written, but not named"
    last = start("broken", anew=True)
    assert last.returncode == 0, last.stderr
    assert "continuing after step 8" in last.stdout
    assert losses(metrics) == expected
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["12", "16", "8"]


@pytest.fixture(scope="module")
def small_config(tiny_config):
    """Eight steps of one layer, checkpoints after four and eight."""
    config = tiny_config(steps=8, evaluate_every=8, checkpoint_every=4)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1, implementation="reference"),  # compiles fastest
        data=dataclasses.replace(config.data, sequence_length=64),
    )


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    """The folder of a finished run on one device, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(small_config, folder, devices=jax.devices()[:1], quiet=True)


@pytest.mark.filterwarnings("ignore:coroutine 'Store:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_newest_readable_checkpoint_is_taken(small_config, finished, tmp_path, capsys):
    """With the last checkpoint's arrays damaged, the run goes on from the one before to the same end."""
    shutil.copytree(finished[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "8" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = train(small_config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert "checkpoint 8 cannot be read" in capsys.readouterr().out
    assert (tmp_path / "run" / "unreadable" / "8").is_dir()
    assert not result.already_complete
    assert losses(tmp_path / "run" / "metrics.jsonl") == losses(finished[0] / "metrics.jsonl")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(result.model), nnx.state(finished[1].model))


def test_a_run_continues_on_another_mesh(small_config, finished, tmp_path):
    """A checkpoint of one device is read in eight pieces; the losses go on to within rounding."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    result = train(dataclasses.replace(small_config, mesh=MeshConfig(fsdp=8)), tmp_path / "run", quiet=True)
    got, want = ([r["loss"] for r in records if "loss" in r] for records in (result.records, finished[1].records))
    assert got[:4] == want[:4] and len(got) == 8
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_checkpoint_is_a_copy(small_config, tmp_path):
    """Steps taken while a save is under way, into the buffers that the saved state gave up, do not reach the file."""
    mesh = make_mesh(small_config.mesh, jax.devices()[:1])
    batches = train_batches(prepare(small_config.data, quiet=True), small_config.data)
    with use_mesh(mesh), Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        plan, step = plan_and_trace(small_config, mesh, 1)
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
