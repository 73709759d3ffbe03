"""Language models built from the layers, by a config."""

from glax.models.config import ModelConfig
from glax.models.decoder import Decoder, cast, decoder
from glax.models.language_model import LanguageModel
from glax.models.presets import PRESETS
from glax.models.rows import check_room, choose_rows, repeat_rows

__all__ = [
    "PRESETS",
    "Decoder",
    "LanguageModel",
    "ModelConfig",
    "cast",
    "check_room",
    "choose_rows",
    "decoder",
    "repeat_rows",
]
