"""Text in, training batches out: sources, tokenizers, prepared token shards, and exactly resumable grain pipelines."""

from glax.data.batches import TrainBatches, ValidationBatches, train_batches, validation_batches
from glax.data.config import DataConfig
from glax.data.preparation import PreparedData, prepare
from glax.data.shards import TokenStore
from glax.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "DataConfig",
    "PreparedData",
    "TokenStore",
    "Tokenizer",
    "TrainBatches",
    "ValidationBatches",
    "check_vocabulary",
    "load_tokenizer",
    "prepare",
    "train_batches",
    "validation_batches",
]
