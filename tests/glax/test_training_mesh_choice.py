"""``--mesh auto`` takes the simplest mesh that fits, says why, and refuses where none does."""

import dataclasses

import pytest

from glax.data import DataConfig
from glax.errors import UserError
from glax.models import PRESETS
from glax.training import MeshConfig, TrainConfig, train
from glax.training.mesh_choice import choose_mesh, estimated_bytes


def config(model: str, rows: int, length: int, remat: str = "full") -> TrainConfig:
    model = dataclasses.replace(PRESETS[model], remat=remat)
    return TrainConfig(model, DataConfig(batch_size=rows, sequence_length=length))


@pytest.mark.parametrize(
    ("model", "rows", "length", "devices", "mesh", "said"),
    [
        ("gla-340m", 256, 2048, 1, MeshConfig(data=1), "256 rows"),
        ("gla-340m", 256, 2048, 8, MeshConfig(data=8), "256 rows over 8"),
        ("gla-7b", 64, 32768, 64, MeshConfig(data=8, fsdp=8), "the state in 8 pieces, since whole it would not fit"),
        ("gla-1.3b", 1, 1 << 20, 64, MeshConfig(data=1, sequence=64), "1,048,576 tokens of a row over 64"),
        ("gla-1.3b", 4, 1 << 20, 64, MeshConfig(data=4, sequence=16), "4 rows over 4; the 1,048,576 tokens"),
        ("gla-340m", 4, 2050, 16, MeshConfig(data=4, sequence=2, tensor=2), "heads and MLP over 2"),
    ],
)
def test_choices_for_80_gb(model, rows, length, devices, mesh, said):
    choice = choose_mesh(config(model, rows, length), devices, 80e9, host=8)
    assert choice.mesh == mesh
    assert said in choice.why and "of 80 GB on each" in choice.why


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"6.74 B parameters .* 2 devices of 80 GB: use more devices"):
        choose_mesh(config("gla-7b", 64, 2048), 2, 80e9, host=8)
    with pytest.raises(UserError, match="no mesh of 3 devices divides 1 rows of 2048 tokens and 4 heads"):
        choose_mesh(config("gla-340m", 1, 2048), 3, 80e9, host=8)


# GB that XLA's compiler for GPUs needed (experiments/results/scaling.json).
COMPILED = {
    ("gla-340m", 16, 2048, 1): 9.5,
    ("gla-340m", 1, 262144, 1): 34.3,
    ("gla-1.3b", 128, 2048, 8): 11.2,
    ("gla-7b", 64, 32768, 64): 18.9,
}


@pytest.mark.parametrize("case", COMPILED)
def test_the_estimate_is_near_what_was_compiled(case):
    model, rows, length, fsdp = case
    estimate = estimated_bytes(config(model, rows, length), MeshConfig(data=1, fsdp=fsdp)) / 1e9
    assert COMPILED[case] < estimate < 1.35 * COMPILED[case]


def test_auto_and_an_axis_are_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"mesh.auto chooses every axis"):
        train(tiny_config(mesh=MeshConfig(auto=True, fsdp=2)), tmp_path / "run")
