"""Every test runs on CPU with eight virtual devices, unless JAX_PLATFORMS says otherwise."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run once or twice, so what LLVM takes to make them faster is not won back.
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 1}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()
# What one test, one xdist worker or one start of a script has compiled, the others read. A folder of this run alone.
if "GLAX_TESTS_COMPILED" not in os.environ:
    os.environ["GLAX_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="glax-tests-")
    atexit.register(shutil.rmtree, os.environ["GLAX_TESTS_COMPILED"], ignore_errors=True)

# Compilation dominates the first call of a shape, so deadlines would measure XLA; the same examples every time.
settings.register_profile("glax", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("glax")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(request: pytest.FixtureRequest):
    """Keeps compiled programs, but for the operators' tests: what cuts a call into shards is not in a program's key.

    There it tells implementations apart; elsewhere there is one for each call.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if Path(__file__).parent / "kernels" in request.path.parents:
        yield
        return
    options = {
        "jax_compilation_cache_dir": os.environ["GLAX_TESTS_COMPILED"],
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_remove_custom_partitioning_ptr_from_cache_key": True,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
