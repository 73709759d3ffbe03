"""What a training run is: model, data, optimiser, mesh, and when to look and save."""

import dataclasses

from glax.data import DataConfig
from glax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a cosine schedule; the defaults are the paper's (Section 5.1; betas from the authors' script)."""

    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""

    initial_learning_rate: float = 3e-5
    """Learning rate of the first step."""

    final_learning_rate: float = 3e-5
    """Learning rate of the last step."""

    warmup_steps: int = 954
    """Steps of linear warm-up. A run that is not longer ends while it still warms up."""

    beta1: float = 0.9
    """Decay of the mean of the gradients."""

    beta2: float = 0.95
    """Decay of the mean of the squared gradients."""

    epsilon: float = 1e-8
    """Added to the root of the mean square."""

    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only (not on norms and biases)."""

    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each named axis. Their product is the number of devices, over all processes."""

    data: int | None = None
    """Copies of the model, each with its share of the batch. None: all devices that the other axes leave."""

    fsdp: int = 1
    """Shards of every parameter, gradient and optimiser state; the batch is divided over this axis too."""

    tensor: int = 1
    """Shards of heads, MLP width and vocabulary."""

    sequence: int = 1
    """Shards of the sequence length; parameters, gradients and optimiser state are cut over this axis as over fsdp.
    Linear mixers exchange a state per head and layer, whatever the length; softmax attention all keys and values."""

    auto: bool = False
    """Choose the axes from the devices, the model and the batch, and say why (also as --mesh auto)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Fields that change the losses belong to the run; the others may differ when it is continued."""

    model: ModelConfig
    """The network."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The text and the shape of a batch."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser and its schedule."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices share the work."""

    steps: int = 28610
    """Batches to train on; the learning rate schedule ends with the last."""

    seed: int = 0
    """Seed of the initial parameters (data.seed is the order of the data)."""

    microbatches: int | None = None
    """Parts that a batch is cut into, one after the other, their gradients added up: more need less memory.
    None: as few as keep a device at 32768 tokens or fewer at a time."""

    evaluate_every: int = 1000
    """Steps between validation passes. There is one before the first step and one after the last in any case."""

    checkpoint_every: int = 500
    """Steps between checkpoints. There is one after the last step in any case."""

    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""

    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay for good. None: only the newest do."""

    max_skipped_steps: int = 20
    """Steps with a non-finite loss or gradient change nothing; this many in a row end the run with an error."""

    log_every: int = 10
    """Steps between lines of progress; metrics.jsonl has a line for every step."""

    tensorboard: bool = False
    """Also write TensorBoard events to the run folder (needs glax[loggers])."""

    wandb: bool = False
    """Also log to Weights & Biases, project glax (needs glax[loggers])."""

    profile: bool = False
    """Write a jax profiler trace of five steps to the run folder's profile/."""


# Fields that leave the mathematics of the run alone: a run may be continued with other values.
OPERATIONAL = frozenset({
    "data.cache",
    "data.prefetch",
    "data.threads",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "max_skipped_steps",
    "mesh.auto",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "microbatches",
    "profile",
    "tensorboard",
    "wandb",
})  # fmt: skip
