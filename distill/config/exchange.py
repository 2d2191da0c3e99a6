"""Settings of ``-m distill.export`` and of ``-m distill.ingest``."""

from dataclasses import dataclass, field

from distill.config.generate import CacheConfig, StoreConfig
from distill.settings import key


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of ``-m distill.export``."""

    store: CacheConfig = field(default_factory=CacheConfig)
    output: str = key("outputs/export", "folder of the Parquet files", path=True, local=True)
    align: str = key(
        "logits",
        "row t of the targets is about: logits = token t+1, as logits t are (axolotl's kernel); token = token t",
        ("logits", "token"),
    )
    part_tokens: int = key(1 << 20, "tokens of a part, about; a part is the unit of work, and one file", least=1)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True, local=True)


@dataclass(frozen=True)
class IngestTeacherConfig:
    """Whose log-probabilities they are: its tokenizer and its configuration are read, never its weights."""

    model: str = key("demo", "Hugging Face id or folder", path=True)
    revision: str | None = key(None, "branch, tag or commit on the Hugging Face hub")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")


@dataclass(frozen=True)
class CapturedConfig:
    """What others captured."""

    path: str = key("outputs/export", "file, glob, folder or hub id; docs/interchange.md has the columns", path=True)
    name: str | None = key(None, "configuration of the dataset, as in datasets.load_dataset")
    split: str = key("train", "split of the dataset; where there is only one, that one instead of train")
    data_files: str | list[str] | None = key(None, "file, glob or list of them, as in datasets.load_dataset", path=True)
    max_samples: int | None = key(None, "use only the first N examples of the dataset", least=1)
    align: str = key(
        "auto",
        "row t of target_* is about: logits = token t+1, token = token t; auto = what target_mask says",
        ("auto", "logits", "token"),
    )


@dataclass(frozen=True)
class IngestConfig:
    """Every setting of ``-m distill.ingest``."""

    teacher: IngestTeacherConfig = field(default_factory=IngestTeacherConfig)
    dataset: CapturedConfig = field(default_factory=CapturedConfig)
    seed: int = key(0, "seed of the order in which samples are laid out", least=0)
    store: StoreConfig = field(default_factory=StoreConfig)
    timeout_seconds: int = key(600, "the run ends when a worker makes no progress for so long", least=1)
    log_dir: str = key("logs", "folder of the workers' logs", path=True, local=True)
