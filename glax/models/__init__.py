"""Language models built from the layers, by a config."""

from glax.models.config import ModelConfig
from glax.models.language_model import LanguageModel
from glax.models.presets import PRESETS

__all__ = ["PRESETS", "LanguageModel", "ModelConfig"]
