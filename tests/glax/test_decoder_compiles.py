"""The decode loop of GLA 1.3B compiles for an H200 as five Triton kernels a layer: checked with no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "tests/kernels/gla/h200.txtpb"
LAYERS = 2

COMPILE = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from glax.models import LanguageModel, ModelConfig, decoder
from kernels import dispatch

dispatch.platform_of = lambda x: "gpu"
topology = topologies.get_topology_desc(platform="cuda", target_config=open(sys.argv[1]).read(), topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
config = ModelConfig(hidden_size=2048, num_layers=int(sys.argv[2]), num_heads=4)
model = abstract(jax.eval_shape(lambda: decoder(LanguageModel(config, rngs=nnx.Rngs(0)))))
state = abstract(jax.eval_shape(lambda model: model.init_state(1), model))

def loop(model, token, state):
    def body(_, carry):
        logits, state = model.step(*carry)
        return jnp.argmax(logits, -1).astype(jnp.int32), state
    return jax.lax.fori_loop(0, 8, body, (token, state))

device = AbstractDevice("NVIDIA H200", 132, "gpu")
with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
    lowered = jax.jit(loop, donate_argnums=2).lower(model, abstract(jnp.zeros(1, jnp.int32)), state)
compiled = lowered.compile()
print(compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"'))
print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the CUDA compiler is not installed: glax[cuda]"
)
def test_five_kernels_a_layer_and_no_copy_of_the_weights():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(TARGET), str(LAYERS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, temporary = map(int, done.stdout.split()[-2:])
    assert kernels == 5 * LAYERS + 1  # and the logits
    assert temporary < 2**20
