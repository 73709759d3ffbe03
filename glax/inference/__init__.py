"""Text from models."""

from glax.inference.generation import Decoding, advance, generate, read_prefix, start
from glax.inference.sampling import Sampling
from glax.inference.states import choose_rows, load_state, repeat_rows, save_state

__all__ = [
    "Decoding",
    "Sampling",
    "advance",
    "choose_rows",
    "generate",
    "load_state",
    "read_prefix",
    "repeat_rows",
    "save_state",
    "start",
]
