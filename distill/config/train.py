"""Settings of ``-m distill.train``."""

from dataclasses import dataclass, field
from typing import Any

from distill.errors import ConfigError
from distill.settings import key


@dataclass(frozen=True)
class StoresConfig:
    """Which stores are read."""

    path: str | list[str] = key(
        "outputs/demo.zarr",
        "folder, or URL of an object store (s3://bucket/name); a list of several of one vocabulary",
        path=True,
    )
    weights: list[float] | None = key(
        None, "of several stores, the share of each in every epoch's samples, relative to their sum; null = all of all"
    )
    options: dict[str, str | dict[str, Any]] = key(
        {}, "options of the object stores (needs the extra distill[s3]); credentials in YAML files only", secret=True
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(f"store.path: expected a store, or a list of several, found {self.path}")


@dataclass(frozen=True)
class StudentConfig:
    """Which model is the student, and what it starts from."""

    model: str = key("teacher", "Hugging Face id or folder; teacher = the store's own teacher", path=True)
    layers: int | None = key(
        None, "keep only so many layers, evenly spaced, the first and the last among them; null = all", least=1
    )
    init: str = key("pretrained", "pretrained = its weights; random = only its configuration", ("pretrained", "random"))
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    attn_implementation: str | None = key(None, "attention kernel, passed to transformers")


@dataclass(frozen=True)
class LossConfig:
    """What the student has to match; docs/training.md has the formulas."""

    divergence: str = key(
        "forward_kl",
        "between teacher and student; reverse_kl and jensen_shannon need capture.method=topk, on_policy the student's "
        "own samples",
        ("forward_kl", "reverse_kl", "jensen_shannon", "on_policy"),
    )
    tail: str = key(
        "bucket",
        "with topk, the mass outside the kept ids: one bucket, renormalised away, or given to the next token",
        ("bucket", "renormalize", "ground_truth"),
    )
    temperature: float = key(
        1.0, "softens both distributions; the store must hold it (capture.method=topk, capture.temperatures)"
    )
    alpha: float = key(1.0, "share of the divergence; the rest is cross-entropy with the next token")
    max_advantage: float | None = key(None, "on_policy: a bound of |log p - log q| in the gradient; null = none")
    max_ratio: float | None = key(
        None, "on_policy: weigh a token by q / its probability when it was sampled, at most by this; null = no weights"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to a tenth."""

    learning_rate: float = key(3e-4, "peak learning rate")
    weight_decay: float = key(0.1, "weight decay of matrices; vectors (norms, biases) have none")
    warmup: float = key(0.05, "share of the steps until the learning rate is at its peak")
    clip: float = key(1.0, "largest norm of the gradient")
    epochs: int = key(1, "passes over the training samples", least=1)
    steps: int | None = key(None, "optimizer steps, instead of epochs", least=1)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip <= 0 or self.weight_decay < 0 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                "optimizer: expected learning_rate > 0, clip > 0, weight_decay >= 0 and warmup in [0, 1], found "
                f"{self.learning_rate}, {self.clip}, {self.weight_decay} and {self.warmup}"
            )


@dataclass(frozen=True)
class TrainBatchConfig:
    """How samples are read and batched for the student."""

    samples: int = key(8, "samples in a worker's forward pass", least=1)
    accumulate: int = key(1, "forward passes in an optimizer step", least=1)
    packed: bool = key(True, "put samples end to end in rows; refused where they would see each other")
    readers: int = key(2, "DataLoader workers of each worker", least=0)
    window_blocks: int = key(
        16, "blocks (pieces of 65,536 rows of larger ones) in a reader's memory, shuffled together", least=1
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is held out, by whole examples of the dataset, and how often the student is measured on it."""

    samples: int = key(64, "samples held out of training, about; 0 = none, and no evaluation", least=0)
    every: int = key(100, "steps between two evaluations; there is always one before and one after", least=1)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``-m distill.train``."""

    store: StoresConfig = field(default_factory=StoresConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: TrainBatchConfig = field(default_factory=TrainBatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: str = key("ddp", "ddp = a whole student on each worker; fsdp = a share of it (FSDP2)", ("ddp", "fsdp"))
    autocast: str = key(
        "auto", "dtype of the matrix products: auto = bfloat16 on a GPU", ("auto", "float32", "bfloat16")
    )
    device: str = key("auto", "auto (cuda if there is one), cpu, or cuda")
    seed: int = key(0, "seed of held-out samples, shuffling, random weights and dropout", least=0)
    checkpoint_every: int = key(100, "steps between two checkpoints", least=1)
    output: str = key(
        "outputs/student", "folder of the student, its checkpoints and its metrics", path=True, local=True
    )
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True, local=True)
