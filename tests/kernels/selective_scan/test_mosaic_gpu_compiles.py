"""The Hopper kernels compile for an H200, fit it, and keep their values in registers: checked with no GPU.

In a process of its own, whose ptxas report (MOSAIC_GPU_DUMP_PTXAS) is read back. A kernel that wants more shared memory
than a block can have does not compile; that two blocks share a multiprocessor is checked by its registers and the size.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGET = Path(__file__).parents[1] / "gla" / "h200.txtpb"
ROOT = Path(__file__).resolve().parents[3]

COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from kernels.selective_scan.mosaic_gpu import selective_scan

topology = topologies.get_topology_desc(platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
B, T, E, N, dtype, everything = 4, 2048, 2048, 16, jnp.dtype(sys.argv[2]), sys.argv[3] == "everything"
x, BC, state = array(B, T, E, dtype=dtype), array(B, T, N, dtype=dtype), array(B, E, N)
inputs = [x, x, array(E, N), BC, BC, array(E), state if everything else None]
segment_ids = array(B, T, dtype=jnp.int32) if everything else None
cotangents = (x, state) if everything else x

def forward_and_backward(segment_ids, cotangents, *inputs):
    def call(*inputs):
        *inputs, state = inputs
        options = {"initial_state": state, "segment_ids": segment_ids, "return_final_state": everything}
        return selective_scan(*inputs, **options)

    y, vjp = jax.vjp(call, *inputs)
    return y, *vjp(cotangents)

jax.jit(forward_and_backward).lower(segment_ids, cotangents, *inputs).compile()
"""

REPORT = re.compile(
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info +: Used (?P<registers>\d+) registers"
)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the compilers come with the cuda extra"
)
@pytest.mark.parametrize("dtype, extras", [("bfloat16", "nothing"), ("float32", "everything")])
def test_compiles_without_spills(dtype, extras):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, str(TARGET), dtype, extras]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    reports = [[int(report[n]) for n in ("registers", "stores", "loads")] for report in REPORT.finditer(done.stdout)]
    print(dtype, extras, reports)
    (forward, *forward_spills), (backward, *backward_spills) = reports
    assert forward_spills == backward_spills == [0, 0]
    assert forward <= 128  # four blocks to a multiprocessor
    assert backward <= 255  # two
