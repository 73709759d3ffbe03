"""Checkpoints in the Hub's formats: GLA, RetNet and Transformer as fla has them, Llama as transformers has it."""

from glax.interop.configs import read_config, written_config
from glax.interop.hub import checkpoint_folder
from glax.interop.load import load_model
from glax.interop.names import Checkpoint, layout_of
from glax.interop.save import save_model

__all__ = [
    "Checkpoint",
    "checkpoint_folder",
    "layout_of",
    "load_model",
    "read_config",
    "save_model",
    "written_config",
]
