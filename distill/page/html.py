"""The report as one HTML file, which asks for nothing: style, script, plots and data are in it.

Texts of the data are untrusted. Here they are escaped; in the page they are text, never HTML; and the page's own policy
lets no script run but its own, and no request out.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from distill.errors import ConfigError
from distill.page import figures
from distill.page.look import MOST_SHOWN, Look, surprise
from distill.page.students import Difference, Seen, Student, expected
from distill.page.words import Words, pieces
from distill.reading.samples import Sample
from distill.student.metrics import SHOWN

_HERE = Path(__file__).parent
_BEFORE = 40  # tokens
_BETTER_LARGE = {"top1_agreement"}
_NEITHER = {"entropy", "log_ratio"}


class Page:
    """The parts of a report, put together one after the other."""

    def __init__(self, tokenizer: Any, method: str) -> None:
        """tokenizer: None where it is not at hand; then tokens are shown as ids. method: the store's capture.method."""
        self._tokenizer, self._method = tokenizer, method
        self._words = Words(tokenizer)
        self._samples: list[Any] = []
        self._bars: list[Any] = []
        self._parts: list[str] = []

    def head(self, title: str, lead: str, lines: Mapping[str, str], arrays: Sequence[Sequence[str]]) -> None:
        """The title, what the store is, and its arrays: rows of cells, the first one a row of names."""
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines.items())
        self._parts.append(
            f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p></header><dl>{rows}</dl>"
            f"<details><summary>its {len(arrays) - 1} arrays</summary>{_table(arrays)}</details>"
        )

    def store(self, look: Look) -> None:
        """The plots of a store."""
        self._parts.append(
            f"<section><h2>In figures</h2><p class=note>From {look.num_samples:,} samples at even distances, "
            f"{look.num_tokens:,} tokens.</p>{_figures(figures.of_store(look, self._method))}</section>"
        )

    def tokens(self, look: Look) -> None:
        """The samples as running text, each token tinted by how surprised the teacher was."""
        known = any("next_logprob" in sample for kind in look.shown.values() for sample in kind)
        tint = (
            "Tinted by how surprised the teacher was: <span class=note>sure<span class=scale></span>8 nats or more"
            "</span>."
            if known
            else "The store does not say how likely each token was: nothing is tinted."
        )
        parts = [
            f"<section><h2>Token by token</h2><p>{tint} Point at a token, tap it, or go there with the arrow keys, to "
            "see what the teacher expected in its place. Dotted: not trained on.</p>"
        ]
        for kind, samples in look.shown.items():
            for sample in samples:
                nll = surprise(sample)[1]
                mean = f", {nll.mean():.2f} nats a token" if len(nll) else ""
                length, first = len(sample["tokens"]), _first_shown(sample)
                cut = f", {MOST_SHOWN} from token {first:,} on of" if length > MOST_SHOWN else ","
                parts.append(
                    f"<h3>{kind}: sample {sample['sample']}{cut} {length:,} tokens{mean}</h3>"
                    f'<div class="card tokens" dir=auto role=group aria-label="sample {sample["sample"]}, token by '
                    f'token" data-sample={len(self._samples)}></div>'
                )
                self._samples.append(self._tokens_of(sample))
        self._parts.append("".join(parts) + "</section>")

    def students(self, students: Sequence[Student], seen: Seen) -> None:
        """How students did, what they say, and where they differ from the teacher."""
        parts = ["<section><h2>Students</h2>", _table(_figures_of(students, seen.alike), best=True)]
        if not seen.alike:
            parts.append("<p class=note>They have not held out the same samples: do not compare their figures.</p>")
        parts.append(_figures(figures.of_students({one.name: one.lines for one in students})))
        origin = "held-out samples" if seen.held_out else "samples, which may have been trained on,"
        parts.append(f"<h3>What they say</h3><p class=note>Beginnings of {origin} continued greedily.</p>")
        for i, (beginning, text) in enumerate(zip(seen.beginnings, seen.texts, strict=True)):
            rows = [("the text itself", text)]
            before = [(one.name, one.said["before"][i]) for one in students if one.said["before"]]
            alike = all(said == before[0][1] for _, said in before)
            rows += (
                [("before", before[0][1])] if before and alike else [(f"{name}, before", said) for name, said in before]
            )
            rows += [(one.name, one.said["after"][i]) for one in students]
            rows += [("the teacher", seen.teacher[i])] if seen.teacher else []
            parts.append(
                f"<div class=card><div class='text beginning' dir=auto>{escape(self._text(beginning))}</div>"
                f"<dl class=said>"
                + "".join(
                    f"<dt>{escape(name)}</dt><dd class=text dir=auto>{escape(self._text(said))}</dd>"
                    for name, said in rows
                )
                + "</dl></div>"
            )
        parts += [f"<p class=note>{escape(note)}</p>" for note in seen.notes]
        for one in students:
            if one.differences:
                parts.append(f"<h3>Where {escape(one.name)} differs most from the teacher</h3>")
                parts += [self._difference(each, one.name) for each in one.differences]
        self._parts.append("".join(parts) + "</section>")

    def save(self, title: str, file: Path) -> None:
        """Write the page. Raises ConfigError where that fails; a file of before stays as it was then."""
        script, style = ((_HERE / name).read_text() for name in ("page.js", "page.css"))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        content = {"words": self._words.words, "samples": self._samples, "bars": self._bars}
        data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        text = (
            f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="'
            f'{policy}"><meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href=data:,>'
            f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(self._parts)}"
            f"<noscript><p>The token view needs JavaScript.</p></noscript></main><div id=tip role=tooltip hidden></div>"
            f'<script type="application/json" id=data>{data}</script><script>{script}</script></body></html>\n'
        )
        partial = file.with_name(f"{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8", errors="replace")
            partial.replace(file)
        except OSError as error:
            raise ConfigError(f"-o: cannot write {file}: {error.strerror}") from error

    def _text(self, tokens: Sequence[int]) -> str:
        return "".join(pieces(self._tokenizer, tokens))

    def _tokens_of(self, sample: Sample) -> list[Any]:
        """Of each token: its text, the teacher's -log p, 1 if it is not trained on, what was expected, its word."""
        first = _first_shown(sample)
        tokens = sample["tokens"][: first + MOST_SHOWN].tolist()
        logprobs = sample["next_logprob"].tolist() if "next_logprob" in sample else [math.nan] * len(tokens)
        trained = sample["loss_mask"].tolist() if "loss_mask" in sample else [True] * len(tokens)
        found: list[Any] = []
        for i, (token, text) in enumerate(zip(tokens, pieces(self._tokenizer, tokens), strict=True)):
            if i < first:
                continue
            own = self._words.number(token)
            if i == 0:
                found.append([text, None, 1, None, own])
                continue
            loss = None if math.isnan(logprobs[i - 1]) else round(max(0.0, min(-logprobs[i - 1], 1e4)), 4)
            found.append([text, loss, 0 if trained[i - 1] else 1, self._expected(expected(sample, i - 1)), own])
        return found

    def _expected(self, pairs: Sequence[tuple[int, float | None]]) -> list[Any]:
        return [[self._words.number(token), None if p is None else round(p, 5)] for token, p in pairs]

    def _difference(self, one: Difference, name: str) -> str:
        own = self._words.number(one.following)
        text, word = escape(self._text(one.context)), escape(self._words.words[own])
        parts = [
            f"<div class=card><span class=said-by>sample {one.sample}, KL {one.divergence:.2f} nats</span>"
            f"<div class=differ><p class=text dir=auto>{text}<mark>{word}</mark></p>"
        ]
        for who, pairs in (("the teacher", one.teacher), (name, one.student)):
            parts.append(f"<div><span class=said-by>{escape(who)}</span><div data-bars={len(self._bars)}></div></div>")
            self._bars.append([self._expected(pairs), own])
        return "".join(parts) + "</div></div>"


def _first_shown(sample: Sample) -> int:
    """The first token that is shown: of a chat with a long prompt, one shortly before what is learned from."""
    length = len(sample["tokens"])
    rows = sample["loss_mask"].nonzero() if "loss_mask" in sample and length > MOST_SHOWN else []
    return max(0, min(int(rows[0]) - _BEFORE, length - MOST_SHOWN)) if len(rows) else 0


def _figures(plots: Mapping[str, str]) -> str:
    parts = (f"<figure><figcaption>{escape(words)}</figcaption>{svg}</figure>" for words, svg in plots.items())
    return f"<div class=figures>{''.join(parts)}</div>"


def _table(rows: Sequence[Sequence[str]], best: bool = False) -> str:
    """best: the last cell of a row is the number of its best one, which is set off; 0: none."""
    head, *body = rows
    parts = ["<div class=wide><table><tr>", *(f"<th scope=col>{escape(cell)}</th>" for cell in head), "</tr>"]
    for row in body:
        cells, winner = (row[:-1], int(row[-1])) if best else (row, 0)
        parts.append("<tr>")
        for i, cell in enumerate(cells):
            kind = " class=best" if winner and i == winner else ""
            parts.append(f"<td{kind}>{escape(cell)}</td>")
        parts.append("</tr>")
    return "".join(parts) + "</table></div>"


def _figures_of(students: Sequence[Student], alike: bool) -> list[list[str]]:
    """A table of held-out figures, as `_table` takes it: those before the first student's training, then of each."""
    columns = {"before": students[0].lines[0]["held_out"]}
    columns |= {one.name: one.lines[-1]["held_out"] for one in students}
    rows = [[f"held out, {columns['before']['tokens']:,} tokens", *columns]]
    for figure, words in SHOWN.items():
        values = [found.get(figure) for found in columns.values()]
        known = {i: value for i, value in enumerate(values, 1) if value is not None}
        if not known:
            continue
        pick = max if figure in _BETTER_LARGE else min
        winner = 0 if figure in _NEITHER or len(known) < 2 or not alike else pick(known, key=lambda i: known[i])
        rows.append([words, *("-" if value is None else f"{value:.4f}" for value in values), str(winner)])
    return rows
