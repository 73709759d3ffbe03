import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from glax.errors import UserError
from glax.training import MeshConfig, OptimizerConfig, train
from glax.training.loggers import TensorBoard
from glax.training.metrics import MetricsFile, read_metrics
from glax.training.plot import plot_losses
from glax.training.run_folder import check_same_run, owned, write_atomically


def test_another_config_is_refused_by_field(tiny_config, tmp_path):
    config = tiny_config()
    with owned(tmp_path / "run", config):
        pass
    check_same_run(tmp_path / "run", config)
    check_same_run(tmp_path / "run", dataclasses.replace(config, mesh=MeshConfig(fsdp=8), microbatches=2, log_every=1))
    other = dataclasses.replace(config, steps=21, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=6))
    with pytest.raises(UserError, match=r"optimizer.warmup_steps is 5 there and 6 here; steps is 20 there and 21 here"):
        check_same_run(tmp_path / "run", other)


def test_a_field_that_came_after_a_run_began(tiny_config, tmp_path):
    """It has its default there; one that has gone since is another config."""
    config = tiny_config()
    path = tmp_path / "config.json"
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert saved["model"].pop("attention_window") is None and saved.pop("seed") == 0
    path.write_text(json.dumps(saved))
    check_same_run(tmp_path, config)
    with pytest.raises(UserError, match=r"config: seed is 0 there and 7 here\."):
        check_same_run(tmp_path, dataclasses.replace(config, seed=7))
    path.write_text(json.dumps(saved | {"dropout": 0.1}))
    with pytest.raises(UserError, match=r"dropout is 0\.1 there and null here"):
        check_same_run(tmp_path, config)


def test_a_folder_of_something_else_is_refused(tiny_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex but no config\.json"):
        check_same_run(tmp_path, tiny_config())
    with pytest.raises(UserError, match="not a folder"):
        check_same_run(tmp_path / "thesis.tex", tiny_config())


def test_one_process_at_a_time(tiny_config, tmp_path):
    with owned(tmp_path / "run", tiny_config()):
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run" / ".lock")], capture_output=True)
        assert b"BlockingIOError" in other.stderr
        with pytest.raises(UserError, match="another process"), owned(tmp_path / "run", tiny_config()):
            pass


def test_metrics_are_cut_at_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3, 3, 4, 5)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics = MetricsFile(path, last_step=3)
    metrics.write({"step": 4, "loss": float("nan")})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 3, 4]
    assert read_metrics(path)[-1]["loss"] is None


def test_metrics_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=-1)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    metrics.write({"step": 1})
    metrics.sync()
    assert synced == [len('{"step": 1}\n')]


def test_atomic_write_leaves_no_other_file(tmp_path):
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "two")]


def test_many_skipped_steps_stop_the_run(tiny_config, tmp_path):
    config = tiny_config(max_skipped_steps=3, optimizer=OptimizerConfig(learning_rate=float("inf"), warmup_steps=0))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1, implementation="reference"),
        data=dataclasses.replace(config.data, sequence_length=64),
    )
    with pytest.raises(UserError, match="3 steps in a row, up to step 4, had a loss or gradient that is not finite"):
        train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "skipped_steps" in record]
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 3]
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, last_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step)})
    first.close()
    second = TensorBoard(tmp_path, last_step=2)
    second.write({"step": 3, "loss": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_plot_of_few_and_of_missing_points(tmp_path):
    for records in ([], [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 2.0}, {"step": 2, "loss": None}]):
        plot_losses(records, tmp_path / "loss.png", "$a_$")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
