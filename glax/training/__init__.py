"""Training: the paper's recipe, sharded over a mesh, in run folders that survive being killed."""

from glax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from glax.training.loop import TrainResult, train
from glax.training.plot import plot_losses
from glax.training.processes import ProcessConfig, join, leave
from glax.training.recipes import RECIPES, recipe

__all__ = [
    "RECIPES",
    "MeshConfig",
    "OptimizerConfig",
    "ProcessConfig",
    "TrainConfig",
    "TrainResult",
    "join",
    "leave",
    "plot_losses",
    "recipe",
    "train",
]
