"""Settings of ``-m distill.rollout``."""

from dataclasses import dataclass, field

from distill.config.data import ExamplesConfig
from distill.errors import ConfigError
from distill.settings import key


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
    output: str = key("outputs/rollouts", "folder of the rollouts", path=True, local=True)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True, local=True)
