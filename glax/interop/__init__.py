"""Checkpoints in the Hub's formats: GLA, RetNet and Transformer as fla has them, Llama as transformers has it."""

from glax.interop.configs import read_config
from glax.interop.hub import checkpoint_folder
from glax.interop.load import load_model
from glax.interop.save import save_model

__all__ = [
    "checkpoint_folder",
    "load_model",
    "read_config",
    "save_model",
]
