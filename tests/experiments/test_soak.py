"""A sample of the soak: two random kills; experiments/soak.py alone does 200."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_kills(tmp_path):
    """In a process of its own, since it forks: no thread may be there yet."""
    command = [sys.executable, str(ROOT / "experiments" / "soak.py"), "--kills", "2", "--folder", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert '"kills": 2' in done.stdout and '"runs_with_other_losses": 0' in done.stdout
