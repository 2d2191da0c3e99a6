"""A store in words: how large it is, what it keeps, how fast it came."""

from distill.config.generate import GenerateConfig
from distill.store.store import Store
from distill.teacher.choice import Choice
from distill.teacher.worker import Totals


def summary(store: Store, config: GenerateConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: what the store holds, how fast it came, and the next command to type.

    totals: of the work of this run, if it did any.
    """
    found = store.attributes
    size = sum(store.describe(name)[2] for name in store.array_names())
    lines = {
        "samples": f"{found['num_samples']:,}",
        "tokens": f"{found['num_tokens']:,}",
        "size": f"{human(size)}, {size / found['num_tokens']:.0f} bytes/token",
        **Choice.of(store).lines(found["vocab_size"], config.store.codec),
    }
    if totals is not None and totals.tokens:
        lines["speed"] = f"{totals.tokens / totals.seconds:,.0f} tokens/s"
    lines |= {
        "store": store.path,
        "logs": config.log_dir,
        "next": f"python -m distill.inspect {store.path}",
    }
    return "\n" + table(lines)


def table(lines: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def human(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
