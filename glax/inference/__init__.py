"""Text from models."""

from glax.inference.generation import Decoding, advance, generate, read_prefix, start
from glax.inference.sampling import Sampling
from glax.inference.states import load_state, save_state
from glax.inference.text import Completion, TextStream, complete, stream

__all__ = [
    "Completion",
    "Decoding",
    "Sampling",
    "TextStream",
    "advance",
    "complete",
    "generate",
    "load_state",
    "read_prefix",
    "save_state",
    "start",
    "stream",
]
