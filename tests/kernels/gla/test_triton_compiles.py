"""The Triton kernels compile for every kind of card they are for, fit it, and spill little: checked with no GPU.

Triton's own compiler and ptxas do it, for each tile choice, in a process for each kind of card (elsewhere the
interpreter may have taken the kernels' place). Another lowers a whole training step through jax_triton.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}  # that a block can have: a KiB less than the multiprocessor's
WIDTHS = [("bfloat16", 64, 64), ("bfloat16", 256, 512), ("float32", 256, 512)]

# Bytes per thread of registers that do not fit. Where kernels spill today stands what is allowed, and these only ever
# go down; a kernel that is not here may not spill.
ALLOWED_SPILL_BYTES = {
    ("bfloat16", "gradients"): 408,
    ("bfloat16", "states"): 16,
    ("float32", "gradients"): 96,
    ("float32", "prepare"): 4,  # on 9.0, by Triton 3.9; none by 3.6
}

CALLS = """
import json, os, re, sys
import jax, jax.numpy as jnp
from kernels.gla.triton import launch, operator

capability = int(sys.argv[1])
operator._capability = lambda: capability

def training(dtype, K, V):
    # a call with its gradients, and the arguments that it takes
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    B, T, H, G = 2, 256, 4, 2
    inputs = array(B, T, H, K), array(B, T, G, K), array(B, T, G, V), array(B, T, G, K)
    state, documents = array(B, H, K, V, dtype="float32"), array(B, T, dtype="int32")

    def train(cotangents, documents, *inputs):
        def call(q, k, v, log_alpha, state):
            return operator.gated_linear_attention(q, k, v, log_alpha, scale=K**-0.5, initial_state=state,
                                                   segment_ids=documents, return_final_state=True)
        outputs, vjp = jax.vjp(call, *inputs)
        return outputs, vjp(cotangents)

    return train, ((array(B, T, H, V), state), documents, *inputs, state)
"""

COMPILE = """
import contextlib, io
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

calls = {}

def launch_(kernel, inputs, outputs, blocks, tile, capability, **constants):
    calls[kernel.__name__] = kernel, [*inputs, *outputs], len(inputs), tile, constants  # the last of each: backward
    return [jnp.zeros(x.shape, x.dtype) for x in outputs]

launch.launch = launch_
types = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
for widths in json.loads(sys.argv[2]):
    calls.clear()
    train, arguments = training(*widths)
    jax.eval_shape(train, *arguments)
    os.environ["TRITON_CACHE_DIR"] = sys.argv[3]  # jax_triton has emptied it
    triton.knobs.nvidia.dump_ptxas_log = True
    for name, (kernel, arrays, count, tile, constants) in calls.items():
        pointers = [types[x.dtype.name] for x in arrays]
        pointers.insert(count, "i32")
        signature = dict(zip(kernel.arg_names, pointers)) | dict.fromkeys(constants, "constexpr")
        aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(pointers)) if n != count}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        spills = re.search(r"(\\d+) bytes spill stores, (\\d+) bytes spill loads", log.getvalue()).groups()
        registers = int(re.search(r"Used (\\d+) registers", log.getvalue())[1])
        print("KERNEL", json.dumps([*widths, name, compiled.metadata.shared, registers, max(map(int, spills))]))
"""

LOWER = """
train, arguments = training(*json.loads(sys.argv[2]))
text = jax.jit(train).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
print("CALLS", len(re.findall("triton_kernel_call", text)))
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None, reason="jax_triton comes with the triton extra"
)


def output_of(code, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", CALLS + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory):
    """``compiled_for(capability)``: lines of dtype, K, V, kernel, shared memory, registers, bytes spilled."""

    @functools.cache
    def run(capability):
        cache = tmp_path_factory.mktemp("triton")
        lines = output_of(COMPILE, capability, json.dumps(WIDTHS), cache).splitlines()
        return [json.loads(line.removeprefix("KERNEL ")) for line in lines if line.startswith("KERNEL ")]

    return run


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda widths: "-".join(map(str, widths)))
def test_compiles_and_fits(compiled_for, capability, widths):
    kernels = [line[3:] for line in compiled_for(capability) if tuple(line[:3]) == widths]
    assert sorted(name for name, *_ in kernels) == ["gradients", "prepare", "products", "rows", "states"]
    for name, shared, registers, spilled in kernels:
        print(capability, *widths, name, f"{shared / 1024:.0f} KiB, {registers} registers, {spilled} bytes spilled")
        assert shared <= SHARED_KIB[capability] * 1024, name
        allowed = ALLOWED_SPILL_BYTES.get((widths[0], name), 0)
        assert spilled <= allowed, f"{name}: {spilled} bytes spilled, at most {allowed} wanted"


def test_lowers_through_jax_triton():
    """Three kernels forward; forward's first again, and four more, backward."""
    assert output_of(LOWER, 80, json.dumps(["bfloat16", 64, 64])).split() == ["CALLS", "8"]
