"""Many processes, one run: how they find each other, agree when to stop, and leave."""

import dataclasses
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType

import jax
import tyro
from jax.experimental import multihost_utils

from glax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """Where this process stands among those of the run. What is None comes from SLURM (srun) or Open MPI (mpirun)."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same in all processes."""

    count: int | None = None
    """Processes of the run."""

    index: int | None = None
    """Which of them this is, from 0."""

    heartbeat: int = 60
    """Seconds without a sign of life after which a process counts as lost, and the others stop."""


@dataclasses.dataclass(frozen=True)
class Place:
    """What ``jax.distributed.initialize`` needs to know; ``devices`` None: all that this process sees."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


def find_place(config: ProcessConfig, environment: Mapping[str, str]) -> Place | None:
    """Where this process stands; None where it is alone.

    Raises UserError where flags or environment say only a part of it.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        place = _open_mpi(config, environment)
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        place = _slurm(config, environment)
    else:
        place = (config.coordinator, config.count, config.index, None)
        given = [x is not None for x in place[:3]]
        if not any(given):
            return None
        if not all(given):
            raise UserError(
                "processes.coordinator, processes.count and processes.index go together: give all three, or start "
                "with srun or mpirun, which know them"
            )
    coordinator, count, index, devices = place
    if count < 1 or not 0 <= index < count:
        raise UserError(f"processes.index is {index} of {count} processes: it must be from 0 to {count - 1}")
    return None if count == 1 else Place(coordinator, count, index, devices)


def _slurm(config: ProcessConfig, environment: Mapping[str, str]) -> tuple:
    nodes, job = environment["SLURM_STEP_NODELIST"], int(environment.get("SLURM_JOB_ID", 0))
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)  # node07,node09 or node[07-12,14]
    coordinator = config.coordinator or f"{first[1]}{first[2] or ''}:{_port(job)}"
    count = _first(config.count, environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_NTASKS"))
    index = _first(config.index, environment["SLURM_PROCID"])
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8, or 8(x2),4
    return (
        coordinator,
        count,
        index,
        _one_gpu(int(environment["SLURM_LOCALID"]), re.match(r"\d+", tasks)[0], environment),
    )


def _open_mpi(config: ProcessConfig, environment: Mapping[str, str]) -> tuple:
    count = _first(config.count, environment["OMPI_COMM_WORLD_SIZE"])
    index = _first(config.index, environment["OMPI_COMM_WORLD_RANK"])
    local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None and int(local) == int(environment["OMPI_COMM_WORLD_SIZE"]):
        # All on this host. mpirun's name for the job is the same in all of its processes.
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or "0"
        coordinator = f"127.0.0.1:{_port(sum(map(ord, job)) * 37)}"
    if coordinator is None and count > 1:
        raise UserError(
            "mpirun does not say on which host process 0 is: add --processes.coordinator HOST:PORT, with a free port"
        )
    return coordinator, count, index, _one_gpu(int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), local, environment)


def _one_gpu(local_index: int, local_count: str, environment: Mapping[str, str]) -> list[int] | None:
    """The GPU of one of several processes on a host; None for all that it sees: alone, or shown only its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    alone = int(local_count) == 1 or (visible is not None and "," not in visible)
    return None if alone else [local_index]


def _first(given: int | None, *texts: str | None) -> int:
    return given if given is not None else int(next(text for text in texts if text is not None))


def _port(number: int) -> int:
    """A port above those that systems hand out, the same for the same job."""
    return 61440 + number % 4096


def process_config(argv: list[str]) -> ProcessConfig:
    """The processes' part of a command line, which is read first: the rest asks jax for its devices."""
    flags = [pair for pair in itertools.pairwise([*argv, ""]) if pair[0].startswith("--processes.")]
    joined = [name if "=" in name else f"{name}={value}" for name, value in flags]
    return tyro.cli(ProcessConfig, args=["--" + flag.removeprefix("--processes.") for flag in joined])


def join(config: ProcessConfig) -> None:
    """Meet the run's other processes, if there are any. Must come before anything asks jax for its devices.

    Raises UserError where they cannot be met.
    """
    place = find_place(config, os.environ)
    if place is None:
        return
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.index} of {place.count} cannot meet the others at {place.coordinator} "
            f"({_line(error)}): look whether all were started, and give --processes.coordinator a host and port that "
            "all of them reach"
        ) from error


def leave(code: int) -> None:
    """End this process with ``code``; after an error, without waiting for the others, which may be gone."""
    abandon(code)
    sys.exit(code)


def abandon(code: int) -> None:
    """End this process here and now, if ``code`` is an error's and there are others that it would wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (0, 143) and jax.distributed.is_initialized():
        os._exit(code)


class StopSignal:
    """SIGTERM to any of the processes, as one step after which all of them stop."""

    def __init__(self):
        self._told = False
        self._before = None

    def __enter__(self) -> "StopSignal":
        # With several processes jax's preemption service has the signal, and passes it on.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether ``step`` is the last. Every process must ask after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.distributed.is_initialized() else self._told

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True


def or_lost(run: Callable, *arguments):
    """``run(*arguments)``; raises UserError where it fails because another process of the run is gone."""
    try:
        return run(*arguments)
    except (jax.errors.JaxRuntimeError, TimeoutError) as error:  # of a collective, of a barrier
        if jax.process_count() == 1:
            raise
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({_line(error)}): look at the "
            "others' output, and start the same command again, it continues from the last checkpoint"
        ) from error


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
