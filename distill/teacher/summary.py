"""A store in words: how large it is, what it keeps, how fast it came."""

from typing import Any

from distill.config.generate import GenerateConfig
from distill.store.store import Store
from distill.teacher.choice import Choice
from distill.teacher.worker import Totals


def summary(store: Store, config: GenerateConfig, totals: Totals | None = None) -> str:
    """The lines that end a run: what the store holds, how fast it came, and the next command to type.

    totals: of the work of this run, if it did any.
    """
    found = store.attributes
    size = sum(store.describe(name)[2] or 0 for name in store.array_names())
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


def state_of(store: Store) -> str:
    """The format of a store, and how complete it is."""
    found, committed = store.attributes, store.committed()
    state = "complete"
    if not store.complete or not committed.all():
        tokens = int(store.tokens_per_block()[committed].sum())
        state = f"unfinished: {committed.sum()} of {len(committed)} blocks, {tokens:,} tokens"
    return f"{found['format']}, version {found['version']}, {state}"


def description(store: Store) -> tuple[dict[str, str], list[list[str]]]:
    """What a store is, by the names of lines, and a row of cells for each of its arrays, below a row of titles.

    The lines: its teacher, data, method, what each k would keep, its size, versions. Sizes may be unknown over a link.
    """
    found, lengths = store.attributes, store.read_all("sample_length")
    tokens, teacher = max(1, int(store.tokens_per_block()[store.committed()].sum())), found["teacher"]
    rows, total = [["array", "shape", "dtype", "size", "bytes/token"]], 0
    all_known = True
    for name in store.array_names():
        shape, dtype, size = store.describe(name)
        total, all_known = total + (size or 0), all_known and size is not None
        each = ["?", "?"] if size is None else [human(size), f"{size / tokens:.1f}"]
        rows.append([name, " x ".join(map(str, shape)), dtype, *each])
    unknown = "unknown: a web server does not list files, and these are too many to be asked for one by one"
    lines = {
        "teacher": f"{teacher['model']} ({teacher['architecture']}, {teacher['dtype']}), "
        f"vocabulary {found['vocab_size']:,}, tokenizer {found['tokenizer']['vocab_size']:,}",
        "data": f"{found['num_samples']:,} samples, {found['num_tokens']:,} tokens, "
        f"{lengths.min()} to {lengths.max()} a sample, {lengths.mean():.0f} on average",
        "capture": f"{found['method']}, k {found['k']}, temperatures {found['temperatures']}",
        **_unknown(found),
        **Choice.of(store).lines(found["vocab_size"], found["config"].get("store.codec", "portable")),
        "layout": f"{store.num_blocks} blocks of {store.block_rows:,} rows",
        "size": f"{human(total)}, {total / tokens:.0f} bytes/token" if all_known else unknown,
        "made with": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    return lines, rows


def _unknown(found: dict[str, Any]) -> dict[str, str]:
    """Of a store that others captured: how, and what it does not say."""
    if "unknown" not in found:
        return {}
    form = found.get("captured", {}).get("form", "unknown")
    return {"provenance": f"captured by others, read as {form}; unknown: {', '.join(found['unknown'])}"}
