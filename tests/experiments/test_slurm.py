"""The SLURM template, run with a stand-in for srun that starts two tasks as SLURM would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for task in 0 1; do
    SLURM_STEP_NODELIST='node[1-2]' SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=0 \
    SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" || code=$?
done
exit "${code:-0}"
"""

TASK = """
import os, sys
sys.path.insert(0, os.getcwd() + "/experiments")
from glax.training import process_config
from glax.training.processes import find_place
arguments = sys.argv[2:]
place = find_place(process_config(arguments), os.environ)
print("task", sys.argv[1], *arguments, place, flush=True)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize("code", [2, 143])
def test_the_template(tmp_path, code):
    """Both tasks get the arguments and find their places; only a run that was stopped queues itself again."""
    for name, text in {"srun": SRUN, "scontrol": f'#!/bin/sh\necho requeued "$@" >> {tmp_path}/queue\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "task.py").write_text(TASK)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": f"{sys.executable} {tmp_path / 'task.py'}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "17",
        "CODE": str(code),
        "JAX_PLATFORMS": "cpu",
    }
    template = ROOT / "experiments" / "slurm" / "train.sbatch"
    command = ["bash", str(template), "--name", "two words", "--mesh", "auto"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    for index in range(2):
        assert lines[index].startswith("task experiments/language_modeling.py --name two words --mesh auto Place(")
        assert f"'node1:{61440 + 17}', count=2, index={index}, devices=None" in lines[index]
    assert (tmp_path / "queue").exists() == (code == 143)
