"""What to read, how to tokenize it, and the shape of a batch."""

import dataclasses

from glax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text to train and validate on. The defaults train on the sources of the running Python's standard library.

    Raises UserError for numbers that make no batches.
    """

    train: str | None = None
    """Text to train on: a file, a folder, a glob, or a Hub dataset as hub:OWNER/NAME[#CONFIG][@REVISION][:SPLIT].
    Plain text files are one document each; every row of .jsonl (also .gz, .zst) and .parquet files is one.
    None: the sources of the Python standard library."""

    validation: str | None = None
    """Text to validate on, given like train. None: a part of train (see validation_fraction)."""

    tokenizer: str = "bytes"
    """"bytes" (257 tokens), "mistral" (32000, needs glax[mistral]), or the path of a SentencePiece model."""

    cache: str | None = None
    """Folder for prepared token shards. None: $GLAX_CACHE, or glax in $XDG_CACHE_HOME, or ~/.cache/glax."""

    text_field: str = "text"
    """Field (JSONL) or column (Parquet, Hub) that holds a document's text."""

    sequence_length: int = 2048
    """Tokens in a row of a batch."""

    batch_size: int = 16
    """Rows in a batch, over all processes."""

    seed: int = 0
    """Seed of the order of the training data."""

    validation_fraction: float = 0.05
    """Share of train that is kept for validation where no validation data is given."""

    validation_tokens: int | None = None
    """Tokens of a validation pass, at most: documents spread over the validation data. None: all of it."""

    threads: int = 1
    """Threads that assemble training batches ahead of the step. One is fastest from memory; more hide a slow disk."""

    prefetch: int = 16
    """Training batches kept ready."""

    def __post_init__(self):
        least = {"sequence_length": 1, "batch_size": 1, "validation_tokens": 1, "threads": 0, "prefetch": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UserError(f"{name} is {value}: it must be at least {bound}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give a number from 0 to {2**32 - 1}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}: give a share between 0 and 1")
