"""The settings that come with a preset."""

import dataclasses
from functools import partial

from glax.data import DataConfig
from glax.errors import UserError
from glax.models import PRESETS
from glax.training.config import OptimizerConfig, TrainConfig


def _paper(preset: str, tokens: float, rows: int, warmup_tokens: float) -> TrainConfig:
    """The paper's training (Section 5.1): AdamW, peak 3e-4, sequences of 2048, the Mistral tokenizer."""
    batch = rows * 2048
    return TrainConfig(
        model=PRESETS[preset],
        data=DataConfig(tokenizer="mistral", sequence_length=2048, batch_size=rows, validation_tokens=2**23),
        optimizer=OptimizerConfig(warmup_steps=round(warmup_tokens / batch)),
        steps=round(tokens / batch),
    )


def _long(preset: str) -> TrainConfig:
    """For sizes that the paper has not trained: the batch of its largest, and full remat."""
    config = _paper(preset, 100e9, 1024, 1e9)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))


def _bytes(preset: str) -> TrainConfig:
    """A few minutes on two CPU cores, on bytes. A small model wants a larger learning rate than the paper's."""
    return TrainConfig(
        model=PRESETS[preset],
        data=DataConfig(sequence_length=256, batch_size=8, validation_tokens=2**15),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, initial_learning_rate=4e-4, final_learning_rate=4e-4, warmup_steps=30
        ),
        steps=240,
        evaluate_every=80,
        checkpoint_every=80,
    )


_MODELS = ("gla", "transformer", "retnet", "mamba")

# 15 B tokens in batches of 0.5 M, 0.5 B of warm-up; 100 B in batches of 2 M, 1 B of warm-up.
RECIPES = {
    **{f"{model}-small-bytes": partial(_bytes, f"{model}-small-bytes") for model in _MODELS},
    **{f"{model}-tiny": partial(_bytes, f"{model}-tiny") for model in _MODELS},
    **{f"{model}-340m": partial(_paper, f"{model}-340m", 15e9, 256, 0.5e9) for model in _MODELS},
    "gla-7b": partial(_long, "gla-7b"),
    **{f"{model}-1.3b": partial(_paper, f"{model}-1.3b", 100e9, 1024, 1e9) for model in _MODELS},
}


def recipe(preset: str) -> TrainConfig:
    """The training of ``preset`` with its own settings. Raises UserError for an unknown one."""
    if preset not in RECIPES:
        raise UserError(f'unknown preset "{preset}": choose one of {", ".join(RECIPES)}')
    return RECIPES[preset]()
