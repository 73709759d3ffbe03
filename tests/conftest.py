"""Every test runs on CPU with eight virtual devices, unless JAX_PLATFORMS says otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from hypothesis import settings

# Compilation dominates the first call of a shape, so deadlines would measure XLA; the same examples every time.
settings.register_profile("glax", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("glax")
