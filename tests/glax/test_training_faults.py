"""Faults of the machine, injected: each ends in one line that says what to do, and the same command then goes on."""

import dataclasses
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest

from glax.data import prepare, train_batches
from glax.errors import Stopped, UserError
from glax.training import train
from glax.training.checkpoints import Checkpoints
from glax.training.journal import Journal
from glax.training.loggers import TensorBoard
from glax.training.metrics import MetricsFile, read_metrics
from glax.training.run_folder import check_same_run, owned
from glax.training.sharding import make_mesh, use_mesh
from glax.training.state import plan_state

pytestmark = pytest.mark.usefixtures("programs_kept")


@pytest.fixture(scope="module")
def config(tiny_config):
    """Eight steps of one layer, a checkpoint after every second."""
    config = tiny_config(steps=8, evaluate_every=8, checkpoint_every=2, keep_checkpoints=3)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1, implementation="reference"),
        data=dataclasses.replace(config.data, sequence_length=64),
    )


def start(config, folder):
    return train(config, folder, devices=jax.devices()[:1], quiet=True)


def losses(folder) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    start(config, folder)
    return folder


def at_step(monkeypatch, wanted: int, event) -> None:
    """Call ``event`` once the metrics of step ``wanted`` are there."""
    before = Journal.step

    def step(self, number, metrics):
        before(self, number, metrics)
        if number == wanted:
            event()

    monkeypatch.setattr(Journal, "step", step)


def test_sigterm_saves_and_another_host_and_clock_continue(config, finished, tmp_path, monkeypatch):
    """A step that is no multiple of checkpoint_every; then a machine of another name, a year before."""
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 5, saved"):
            start(config, folder)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (folder / "checkpoints" / "5").is_dir()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    result = start(config, folder)
    assert not result.already_complete
    assert losses(folder) == losses(finished)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("room", [6_000, 100_000])
def test_a_full_disk(config, finished, tmp_path, monkeypatch, room):
    """Writes past a size are refused by the system from step 5 on: one line, and what was saved before stays.

    With room for 100,000 bytes only the arrays of a checkpoint are refused, with room for 6,000 some of its small files
    too; the two fail with errors of different kinds.
    """
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # what is imported then would be cut too, and read later
    at_step(monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1])))
    try:
        with pytest.raises(UserError, match=r"cannot write a checkpoint to .*: make room there and start the same"):
            start(config, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    start(config, folder)
    assert losses(folder) == losses(finished)


def test_metrics_and_config_on_a_full_disk(config, tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=-1)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # as above
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*config.json .*: make room"), owned(tmp_path / "a", config):
            pass
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl .*: make room"):
            for step in range(100):
                metrics.write({"step": step})
            metrics.flush()
        with pytest.raises(UserError, match=r"cannot write .*events.out.tfevents.*: make room"):
            events = TensorBoard(tmp_path, last_step=0)
            for step in range(100):
                events.write({"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut_arrays(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 3 :: 97] = bytes(byte ^ 0xFF for byte in content[len(content) // 3 :: 97])
        path.write_bytes(bytes(content))


def lose_the_data_state(checkpoint):
    for path in (checkpoint / "data").rglob("*.json"):
        path.unlink()


def garble_the_data_state(checkpoint):
    for path in (checkpoint / "data").rglob("*.json"):
        path.write_text('{"next_ind')


def lose_the_state(checkpoint):
    shutil.rmtree(checkpoint / "state")


def lose_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.filterwarnings("ignore:coroutine 'Store:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [cut_arrays, flip_bytes, lose_the_data_state, garble_the_data_state, lose_the_state, lose_everything],
)
def test_a_damaged_newest_checkpoint(config, finished, tmp_path, capsys, damage):
    """The one before is taken, with its own place in the data, and that is said."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "8")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batches = train_batches(prepare(config.data, quiet=True), config.data)
    with use_mesh(mesh), Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(plan_state(config, mesh).abstract, batches)
    assert int(state.step) == batches.get_state()["next_index"] == 6
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    batches.close()
    said = capsys.readouterr().out
    assert "checkpoint 8 cannot be read" in said and "going on from 6" in said
    assert (tmp_path / "unreadable" / "8").is_dir()


def test_no_readable_checkpoint(config, finished, tmp_path):
    """The run does not begin again by itself: all stays where it is, its curves too."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        lose_the_state(checkpoint)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(of step 8: .*choose another run name"):
        start(config, folder)
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["4", "6", "8"]
    assert losses(folder) == losses(finished)


def test_lost_curves_of_a_complete_run(config, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "metrics.jsonl").write_bytes(b"\x00\xff" * 99)  # as a loss of power may leave it
    with pytest.raises(UserError, match=r"metrics\.jsonl has lost its validation passes"):
        start(config, folder)


def test_some_checkpoints_stay_for_good(config, tmp_path):
    """The newest two, and every multiple of three. No save leaves a thread, which has three open files, behind."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batches = train_batches(prepare(config.data, quiet=True), config.data)
    with use_mesh(mesh), Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=3) as checkpoints:
        state = plan_state(config, mesh).initialize()
        threads = []
        for step in range(1, 9):
            checkpoints.save(step, state, batches)
            checkpoints.wait()
            threads.append(threading.active_count())
        assert threads[-1] <= threads[1]
    batches.close()
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7", "8"]


def test_a_half_written_config_is_no_other_run(config, tmp_path):
    """Killed while it first wrote config.json, a folder holds the partial file alone: it fits any run."""
    (tmp_path / ".config.json.partial").write_text('{"ste')
    check_same_run(tmp_path, config)
