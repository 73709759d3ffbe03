"""Text from models."""

from glax.inference.generation import Decoding, advance, generate, start
from glax.inference.sampling import Sampling

__all__ = ["Decoding", "Sampling", "advance", "generate", "start"]
