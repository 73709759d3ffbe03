"""Training: the paper's recipe, sharded over a mesh, in run folders that survive being killed."""

from glax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from glax.training.loop import TrainResult, train
from glax.training.plot import plot_losses
from glax.training.recipes import RECIPES, recipe

__all__ = ["RECIPES", "MeshConfig", "OptimizerConfig", "TrainConfig", "TrainResult", "plot_losses", "recipe", "train"]
