"""Eight virtual devices: the same losses as on one, everything in its shards, nothing gathered that has tokens."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from glax.data import prepare, train_batches
from glax.training import MeshConfig
from glax.training.loop import plan_and_trace
from glax.training.sharding import make_mesh, place_batch, use_mesh

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def steps_on(tiny_config):
    """``steps_on(mesh_config, devices)``: losses of twenty steps, the last state, and the HLO of the step."""

    @functools.cache
    def run(mesh_config: MeshConfig, devices: int = 8):
        config = tiny_config(mesh=mesh_config)
        mesh = make_mesh(mesh_config, jax.devices()[:devices])
        batches = train_batches(prepare(config.data, quiet=True), config.data)
        with use_mesh(mesh):
            plan, lowered = plan_and_trace(config, mesh, 1)
            compiled = lowered.compile()
            state = plan.initialize()
            losses = []
            for _ in range(config.steps):
                state, metrics = compiled(state, place_batch(next(batches), mesh))
                losses.append(float(metrics["loss"]))
        batches.close()
        return losses, state, compiled.as_text()

    return run


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_equal_one_devices(steps_on, mesh: str):
    one, _, _ = steps_on(MeshConfig(), devices=1)
    losses, _, _ = steps_on(MESHES[mesh])
    assert one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(losses, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_parameters_and_moments_lie_in_pieces(steps_on, mesh: str):
    _, state, _ = steps_on(MESHES[mesh])
    pieces = MESHES[mesh].fsdp * MESHES[mesh].tensor
    total = held = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        total += leaf.size
        held += leaf.addressable_shards[0].data.size
    # Norms, the low-rank gate and counters are the small rest that is not cut over every axis.
    assert total / pieces <= held < 1.15 * total / pieces


def gathers_with_tokens(hlo: str) -> list[str]:
    """The all-gathers in ``hlo`` of arrays that have a token axis: the length alone has a factor of 3."""
    found = []
    for line in hlo.splitlines():
        instruction = re.search(r"= (.*?) all-gather(?:-start)?\(", line)
        if instruction is None:
            continue
        for dims in re.findall(r"\w+\[([\d,]*)\]", instruction[1]):
            if math.prod(int(size) for size in dims.split(",") if size) % 3 == 0:
                found.append(line.strip())
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_no_token_array_is_gathered(steps_on, mesh: str):
    """q, k, v, log_alpha and every other activation stay where they are, forward and backward."""
    _, _, hlo = steps_on(MESHES[mesh])
    assert gathers_with_tokens(hlo) == []
    if MESHES[mesh].fsdp > 1:
        assert "all-gather" in hlo, "parameters are gathered under fsdp: without any, the search finds nothing"
