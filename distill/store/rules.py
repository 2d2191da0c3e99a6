"""What the values of rows must be, whatever their checksums say: the rules of docs/format.md."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 2**-7 + 2**-11
"""The relative error of a stored log-probability."""

_UNDRAWN = 1e-5
"""Of so little mass a sample may have no draw."""


def broken_rules(rows: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> list[str]:
    """What no teacher would say, of N rows in use: [N, ...] each, of the arrays that there are.

    last: [N], whether a row is a sample's last one
    """
    vocab_size, rules = attributes["vocab_size"], {}
    if "tokens" in rows:
        rules["tokens: an id is outside the vocabulary"] = (rows["tokens"] < 0) | (rows["tokens"] >= vocab_size)
    if "target_ids" in rows:
        ids, logprobs = rows["target_ids"], rows["target_logprobs"].astype(np.float64)
        tail = rows["tail_logprob"].astype(np.float64)
        sampled, unknown = attributes["method"] == "sample", {*attributes.get("unknown", ())}
        said = np.ones(len(ids), bool)
        if sampled:
            rules |= _rules_of_samples(ids, logprobs, tail)
            logprobs = np.where(np.isnan(logprobs), -np.inf, logprobs)
        elif unknown:
            said = ids[:, 0] >= 0
            rules |= _rules_of_captured(rows, said, unknown)
            logprobs = np.where(np.isnan(logprobs), -np.inf, logprobs)
            tail = np.where(np.isnan(tail), -np.inf, tail)
        whole = np.concatenate([logprobs, tail[:, [attributes["temperatures"].index(1.0)]]], axis=1)
        # each is off by _ROUNDING of itself, at most
        slack = 1e-3 + (np.exp(whole) * np.expm1(_ROUNDING * np.clip(-whole, 0, 1e3))).sum(axis=1)
        ordered = np.sort(ids, axis=1)
        partial = sampled or bool(unknown)
        rules |= {
            "target_ids: an id is outside the vocabulary": (ids < (-1 if partial else 0)) | (ids >= vocab_size),
            "target_ids: an id is there twice": (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0),
            "target_logprobs: a log-probability is above 0, or no number": ~(logprobs <= 0),
            "target_logprobs: not in descending order": ~(logprobs[:, 1:] <= logprobs[:, :-1]),
            "tail_logprob: a log-probability is above 0, or no number": ~(tail <= 0),
            "logsumexp: not finite": said[:, None] & ~np.isfinite(rows["logsumexp"]) & ("logsumexp" not in unknown),
            "target_logprobs and tail_logprob: the probabilities do not add up to 1": said
            & ~(np.abs(np.exp(whole).sum(axis=1) - 1) <= slack),
        }
        if "next_logprob" in rows:
            rules |= _rules_of_next(rows, logprobs, whole[:, -1], vocab_size, unknown, said)
    if "sampled_logprob" in rows:
        rules["sampled_logprob: a log-probability is above 0, or after the end"] = (rows["sampled_logprob"] > 0) | (
            rows["last"] & ~np.isnan(rows["sampled_logprob"])
        )
    return [rule for rule, broken in rules.items() if broken.any()]


def _rules_of_next(
    rows: Mapping[str, NDArray[Any]],
    logprobs: NDArray[np.float64],
    tail: NDArray[np.float64],
    vocab_size: int,
    unknown: Collection[str],
    said: NDArray[np.bool_],
) -> dict[str, NDArray[np.bool_]]:
    """What the log-probability of the token that follows cannot be. logprobs, tail: at temperature 1, -inf for none.

    unknown: arrays that need not say anything. said: [N], rows of which a teacher said something
    """
    found, last = rows["next_logprob"].astype(np.float64), rows["last"]
    there, expected_there = ~np.isnan(found), ~last & said
    missing = expected_there & ~there & ("next_logprob" not in unknown)
    rules = {
        "next_logprob: a log-probability is above 0": found > 0,
        "next_logprob: one where no token follows, or none where one does": (there & ~expected_there) | missing,
    }
    if "tokens" in rows:
        following = np.append(rows["tokens"][1:], -1)
        kept = (rows["target_ids"] == following[:, None]) & np.isfinite(logprobs)
        known, is_kept = ~last & there & (following >= 0) & (following < vocab_size), kept.any(axis=1)
        expected = np.where(is_kept, np.where(kept, logprobs, 0).sum(axis=1), tail)
        with np.errstate(invalid="ignore"):  # -inf is what -inf says
            above = found - expected > 1e-3 + _ROUNDING * np.clip(-expected, 0, 1e3)
            below = is_kept & (expected - found > 1e-3 + _ROUNDING * np.clip(-found, 0, 1e3))
        rules["next_logprob: not what target_logprobs and tail_logprob say of the token that follows"] = known & (
            above | below
        )
    return rules


def _rules_of_samples(ids: NDArray[Any], logprobs: NDArray[Any], tail: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """What a sample of a distribution does not have: ids that are kept, with a log-probability, then drawn ones."""
    there, kept = ids >= 0, ~np.isnan(logprobs)
    drawn = there & ~kept
    both = drawn[:, 1:] & drawn[:, :-1]
    return {
        "target_ids: an id after the end of its row": there[:, 1:] & ~there[:, :-1],
        "target_logprobs: a log-probability without an id, or after a drawn one": (kept & ~there)[:, 1:]
        | (kept[:, 1:] & ~kept[:, :-1]),
        "target_logprobs: none in a row": ~(kept & there)[:, 0],
        "target_ids: drawn ones not in ascending order": both & (ids[:, 1:] < ids[:, :-1]),
        "tail_logprob: nothing was drawn of it": ~drawn.any(axis=1) & (np.exp(tail[:, 0]) > _UNDRAWN),
    }


def _rules_of_captured(
    rows: Mapping[str, NDArray[Any]], said: NDArray[np.bool_], unknown: Collection[str]
) -> dict[str, NDArray[np.bool_]]:
    """What rows that others captured do not have. said: [N], rows with targets; the others are not learned from."""
    there, known = rows["target_ids"] >= 0, ~np.isnan(rows["target_logprobs"])
    tail = ~np.isnan(rows["tail_logprob"][:, 0])
    learned = ~rows["last"] & rows.get("loss_mask", np.full(len(said), "tokens" in rows))
    return {
        "target_ids: an id after the end of its row": there[:, 1:] & ~there[:, :-1],
        "target_ids: none in a row that is learned from": learned & ~said,
        "target_logprobs: one without an id, or an id without one": there != known,
        "tail_logprob: one in a row without ids, or one that is unknown": tail & (~said | ("tail_logprob" in unknown)),
        "tail_logprob: none in a row with ids": said & ~tail & ("tail_logprob" not in unknown),
        "logsumexp: one that is unknown": ~np.isnan(rows["logsumexp"]) & ("logsumexp" in unknown),
    }
