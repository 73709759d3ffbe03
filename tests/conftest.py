"""Every test runs on CPU with eight virtual devices, unless JAX_PLATFORMS says otherwise."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,  # eight devices on few busy cores wait for each other
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()

gc.set_threshold(20_000, 20, 50)  # tracing makes many objects and few cycles: as often as usual, it costs a twentieth

# Compilation dominates the first call of a shape, so deadlines would measure XLA; the same examples every time.
settings.register_profile("glax", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("glax")


@pytest.fixture(scope="module", autouse=True)
def few_optimizations(request: pytest.FixtureRequest):
    """Programs run once or twice here, so what is spent on making them fast is not won back.

    Operators held to their oracles are compiled as they will be: there what XLA makes of them is tested too.
    How they are cut over devices is settled before what is left out here, the compiler's work on machine code.
    """
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    kernels = Path(__file__).parent / "kernels" in request.path.parents
    if not kernels or request.path.stem in ("test_sharding", "test_sequence_parallel", "test_default_meshes"):
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
