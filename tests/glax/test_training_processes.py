"""Several processes are one run: they find each other, have one process's losses, stop together, and notice a loss."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glax.errors import UserError
from glax.training.metrics import read_metrics
from glax.training.processes import Place, ProcessConfig, find_place

SCRIPT = Path(__file__).parents[2] / "experiments" / "language_modeling.py"
STEPS = 40
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[07-08,11]",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_a_place_from_slurm():
    coordinator = f"node07:{61440 + 4242 % 4096}"
    assert find_place(ProcessConfig(), SLURM) == Place(coordinator, 6, 5, [1])
    assert find_place(ProcessConfig(), SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}) == Place(coordinator, 6, 5, [1])
    shown_its_own = SLURM | {"CUDA_VISIBLE_DEVICES": "1"}
    assert find_place(ProcessConfig(), shown_its_own) == Place(coordinator, 6, 5, None)
    one_on_each_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x6)", "SLURM_LOCALID": "0"}
    assert find_place(ProcessConfig(), one_on_each_node).devices is None
    assert find_place(ProcessConfig(), SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}).coordinator.startswith("gpu-a:")
    assert find_place(ProcessConfig(coordinator="node99:1"), SLURM).coordinator == "node99:1"
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert find_place(ProcessConfig(), alone) is None


def test_a_place_from_open_mpi():
    with pytest.raises(UserError, match=r"mpirun does not say .* --processes.coordinator HOST:PORT"):
        find_place(ProcessConfig(), OPEN_MPI)
    assert find_place(ProcessConfig(coordinator="a:1"), OPEN_MPI) == Place("a:1", 4, 3, [1])
    on_one_host = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-17@1"}
    place = find_place(ProcessConfig(), on_one_host)
    assert place.coordinator.startswith("127.0.0.1:")
    assert place == find_place(ProcessConfig(), on_one_host)


def test_a_place_from_flags():
    assert find_place(ProcessConfig(), {}) is None
    assert find_place(ProcessConfig(coordinator="a:1", count=2, index=1), {}) == Place("a:1", 2, 1, None)
    with pytest.raises(UserError, match="go together"):
        find_place(ProcessConfig(count=2), {})
    with pytest.raises(UserError, match="index is 2 of 2"):
        find_place(ProcessConfig(coordinator="a:1", count=2, index=2), {})


def free_port() -> int:
    """Below those that Linux gives to whoever asks for any: nobody takes it before the coordinator does."""
    for port in random.Random(os.getpid()).sample(range(20000, 32000), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Start:
    """Processes of one start of the run ``folder``, four virtual devices among them."""

    def __init__(self, count: int, folder: Path, text: Path, *mesh: str):
        self.folder = folder
        address = f"127.0.0.1:{free_port()}"
        flags = {
            "preset": "gla-tiny",
            "name": folder.name,
            "runs": folder.parent,
            "data.train": text / "train",
            "data.validation": text / "validation",
            "data.cache": folder.parent / "cache",
            "model.num-layers": 1,
            "data.sequence-length": 64,
            "data.batch-size": 4,
            "steps": STEPS,
            "evaluate-every": STEPS,
            "checkpoint-every": 15,
            "optimizer.learning-rate": 1e-3,
            "optimizer.initial-learning-rate": 1e-3,
            "implementation": "reference",
            "log-every": 1,
            "sample-tokens": 0,
        }
        shared = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # eight processes compile here: fast, rather than fast code
        }
        if count == 1:  # twice the same programs
            environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")
            environment["JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"] = "1"  # an address: each start has its own
        self.processes = []
        for index in range(count):
            place = {"coordinator": address, "count": count, "index": index, "heartbeat": 20}
            own = [word for flag, value in place.items() for word in (f"--processes.{flag}", str(value))]
            command = [sys.executable, str(SCRIPT), *shared, *mesh, *(own if count > 1 else [])]
            output = (folder.parent / f"output.{count}.{index}").open("w")
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
            )

    def wait_for(self, step: int) -> None:
        """Until metrics.jsonl has that step."""
        metrics = self.folder / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not any(record["step"] == step for record in read_metrics(metrics)):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.output(0)
            time.sleep(0.02)

    def output(self, index: int) -> str:
        return (self.folder.parent / f"output.{len(self.processes)}.{index}").read_text()

    def codes(self, seconds: float = 300) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(max(1, deadline - time.monotonic())) for process in self.processes]


def losses(folder: Path) -> dict[int, float]:
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == sorted(set(steps)), "a step is there twice"
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_two_processes_then_four_then_one(text_folder, tmp_path):
    """Stopped by a SIGTERM to one of two; continued by four, of which one is killed; finished by one alone."""
    unbroken = Start(1, tmp_path / "unbroken", text_folder)
    run = tmp_path / "run"
    two = Start(2, run, text_folder, "--mesh.fsdp", "2", "--mesh.sequence", "2")
    two.wait_for(5)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.codes() == [143, 143], two.output(0)
    stopped = max(losses(run))
    assert f"stopped by SIGTERM after step {stopped}, saved" in two.output(0)
    assert (run / "checkpoints" / str(stopped)).is_dir() and 5 <= stopped < STEPS

    four = Start(4, run, text_folder, "--mesh.fsdp", "2", "--mesh.tensor", "2")
    four.wait_for(stopped + 5)
    assert f"continuing after step {stopped}" in four.output(0)
    four.processes[3].kill()
    killed = time.monotonic()
    codes = four.codes(120)
    assert codes[3] == -signal.SIGKILL and 0 not in codes
    assert time.monotonic() - killed < 120
    for index in range(3):
        said = ("lost another one", "heartbeat timeout", "JAX distributed service detected fatal errors")
        assert any(words in four.output(index) for words in said), four.output(index)

    one = Start(1, run, text_folder)
    assert one.codes() == [0], one.output(0)
    assert unbroken.codes() == [0], unbroken.output(0)
    got, want = losses(run), losses(tmp_path / "unbroken")
    assert list(got) == list(want) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=0, atol=1e-5)
