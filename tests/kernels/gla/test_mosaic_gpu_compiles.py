"""The Hopper kernels compile for an H200, fit it, and spill no register (to local memory, in the loop over chunks):
checked with no GPU.

Each shape compiles in a process of its own, whose ptxas report (MOSAIC_GPU_DUMP_PTXAS) is read back. A kernel that
wants more shared memory than a block can have does not compile, so that it compiles is the check that it fits.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGET = Path(__file__).with_name("h200.txtpb")
ROOT = Path(__file__).resolve().parents[3]

SHAPES = {  # B, T, H, K, V
    "fig2_2k": (32, 2048, 16, 64, 64),
    "fig2_16k": (4, 16384, 16, 64, 64),
    "d128_2k": (32, 2048, 8, 128, 128),
    "long_8k": (1, 8192, 96, 128, 128),
    "340m_2k": (32, 2048, 4, 128, 256),
    "1b3_2k": (16, 2048, 4, 256, 512),
    "1b3_32k": (1, 32768, 4, 256, 512),
}

# Device memory of forward + backward beyond inputs, MiB: temporaries and outputs. Numbers only go down. Wanted
# at fig2_2k: 720. Its outputs, o among them, are 640; dv takes the place of the states that the forward saves.
ALLOWED_MIB = {"fig2_2k": 650, "d128_2k": 786, "1b3_2k": 710}

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from kernels.gla.mosaic_gpu import gated_linear_attention

target, (B, T, H, K, V), everything = open(sys.argv[1]).read(), json.loads(sys.argv[2]), json.loads(sys.argv[3])
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
G = H // 2 if everything else H
inputs = [array(B, T, H, K), array(B, T, G, K), array(B, T, G, V), array(B, T, G, K)]
cotangents, documents = array(B, T, H, V), None
if everything:
    state = array(B, H, K, V, dtype=jnp.float32)
    inputs, cotangents, documents = [*inputs, state], (cotangents, state), array(B, T, dtype=jnp.int32)

def call(documents, q, k, v, log_alpha, state=None):
    return gated_linear_attention(q, k, v, log_alpha, scale=K**-0.5, initial_state=state, segment_ids=documents,
                                  return_final_state=everything)

def forward_and_backward(documents, cotangents, *inputs):
    o, vjp = jax.vjp(lambda *inputs: call(documents, *inputs), *inputs)
    return o, *vjp(cotangents)

for name, f, inputs in (
    ("forward", call, (documents, *inputs)),
    ("forward_and_backward", forward_and_backward, (documents, cotangents, *inputs)),
):
    memory = jax.jit(f).lower(*inputs).compile().memory_analysis()
    print("PROGRAM", name, memory.temp_size_in_bytes + memory.output_size_in_bytes, flush=True)
"""

REPORT = re.compile(
    r"entry function '(?P<name>\w+)_mosaic_gpu_kernel'.*\n.*\n"
    r".* (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info +: Used (?P<registers>\d+) registers"
)


def hidden_zeros(ptx):
    """Registers that hold a zero, are copied from, and are accumulators too: ptxas sees no zero in the copies."""
    zeros = set(re.findall(r"mov\.b32\s+(%r\d+), 0;", ptx))
    accumulators = {x for each in re.findall(r"wgmma\.mma_async[^{]*\{([^}]*)\}", ptx) for x in each.split(",")}
    return zeros & accumulators & set(re.findall(r"mov\.b32\s+%r\d+, (%r\d+);", ptx))


def compile_for_h200(shape, everything=False):
    """{kernel: (registers, bytes spilled)}, and the MiB of forward + backward; products start at zeros that are seen.

    With `everything` also documents, states in and out, and two query heads to a group.
    """
    command = [sys.executable, "-c", COMPILE, str(TARGET), json.dumps(shape), json.dumps(everything)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    programs = re.split(r"^\.version ", done.stdout, flags=re.MULTILINE)[1:]
    assert len(programs) > 1 and not any(map(hidden_zeros, programs))
    size = int(re.search(r"^PROGRAM forward_and_backward (\d+)", done.stdout, re.MULTILINE)[1])
    kernels = {
        report["name"]: (int(report["registers"]), max(int(report["stores"]), int(report["loads"])))
        for report in REPORT.finditer(done.stdout)
    }
    return kernels, size / 2**20


def distinct_kernels():
    """Of the shapes, those with kernels of their own: B, T, H, and how many blocks and pieces, are numbers in them."""
    from kernels.gla.mosaic_gpu.pieces import WHOLE
    from kernels.gla.mosaic_gpu.tiles import backward_tiles, forward_tiles, is_wide, wide_pieces

    cases = {}
    for name, (B, T, H, K, V) in SHAPES.items():
        q, v = (B, T, H, K), (B, T, H, V)
        tiles = [of(q, v) for of in (forward_tiles, backward_tiles)]
        tiles = [x if x.cut.shorter else dataclasses.replace(x, cut=WHOLE) for x in tiles]
        cut = wide_pieces(q, v, 1) > 1
        cases.setdefault((K, V, cut) if is_wide(K, V) else (K, *tiles), name)
    return list(cases.values())


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the compilers come with the cuda extra"
)


@pytest.mark.parametrize("name", distinct_kernels())
def test_compiles_without_spills(name):
    kernels, size = compile_for_h200(SHAPES[name])
    print(name, kernels, f"{size:.0f} MiB")
    for kernel, (registers, spilled) in kernels.items():
        assert registers <= 255
        assert spilled == 0, f"{kernel}: {spilled} bytes spilled"
    assert size <= ALLOWED_MIB.get(name, float("inf"))


@pytest.mark.parametrize("K, V", [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256)])
def test_compiles_with_everything(K, V):
    """On a sequence that is cut into pieces."""
    kernels, _ = compile_for_h200((2, 2048, 8, K, V), everything=True)
    print(kernels)
    assert all(spilled == 0 for _, spilled in kernels.values())


MESH = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from kernels.gla.mosaic_gpu import gated_linear_attention

topology = topologies.get_topology_desc(platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x2x1")
sharding = NamedSharding(topologies.make_mesh(topology, (2,), ("data",)), PartitionSpec(None, "data"))
T, H, K, V = json.loads(sys.argv[2])
q, v = (jax.ShapeDtypeStruct((3, 2, T, H, width), jnp.bfloat16, sharding=sharding) for width in (K, V))

def forward_and_backward(do, *inputs):
    call = jax.vmap(lambda *inputs: gated_linear_attention(*inputs, scale=0.125))
    o, vjp = jax.vjp(call, *inputs)
    return o, *vjp(do)

print(jax.jit(forward_and_backward).lower(v, q, q, v, q).compile().as_text())
"""


@pytest.mark.parametrize("T, H, K, V", [(64, 1, 64, 64), (1024, 16, 128, 256)], ids=["narrow", "wide"])
def test_compiles_for_shares_of_a_batch(T, H, K, V):
    """On two GPUs, vmapped: each walks its own rows, and nothing is gathered. The wide heads are cut into pieces, as
    three times the rows, which a device has, would not be."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MESH, str(TARGET), json.dumps([T, H, K, V])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    program = done.stdout
    assert "gather" not in program and "all-reduce" not in program
    assert f"bf16[1,3,{T},{H},{K}]" in program  # dq of a device's share: a row of each of three vmapped calls
