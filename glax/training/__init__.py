"""Training: the paper's recipe, sharded over a mesh, in run folders that survive being killed."""

from glax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from glax.training.loop import TrainResult, train
from glax.training.plot import plot_losses
from glax.training.processes import ProcessConfig, abandon, join, leave, process_config
from glax.training.recipes import RECIPES, recipe

__all__ = [
    "RECIPES",
    "MeshConfig",
    "OptimizerConfig",
    "ProcessConfig",
    "TrainConfig",
    "TrainResult",
    "abandon",
    "join",
    "leave",
    "plot_losses",
    "process_config",
    "recipe",
    "train",
]
