"""From rows of a store to the columns that trainers read, in the convention of axolotl's distillation.

T tokens of a sample, K ids of a row, N rows of several samples.

    input_ids         [T]     the tokens
    attention_mask    [T]     1
    labels            [T]     the token itself where it is trained on, else -100; the first follows nothing
    target_token_ids  [T, K]  what the teacher expects
    target_logprobs   [T, K]  the log of the weight of each id: its probability; of an id that was drawn, an equal part
                              of all that was not kept
    target_mask       [T, K]  1 where there is an id, and the token that it is about is trained on

Row t of a target is about token t+1, as the logits of position t are (align=logits); or, moved by one row, about
token t (align=token). What is not there is masked: id 0, log-probability -1e9, which is finite: 0 times it is 0.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Rows = dict[str, NDArray[Any]]

IGNORED = -100
"""The label of a token that is not trained on."""

NOTHING = -1e9
"""The log-probability where there is no id."""

_IDS, _MASK, _LOGPROBS = (pa.list_(kind) for kind in (pa.int32(), pa.int8(), pa.float32()))
SCHEMA = pa.schema(
    [
        ("input_ids", _IDS),
        ("attention_mask", _MASK),
        ("labels", _IDS),
        ("target_token_ids", pa.list_(_IDS)),
        ("target_logprobs", pa.list_(_LOGPROBS)),
        ("target_mask", pa.list_(_MASK)),
    ]
)


def log_weights(rows: Rows, column: int) -> NDArray[np.float32]:
    """[N, K]: the log of the weight of each id; -inf where there is none. column: of tail_logprob at temperature 1."""
    ids, logprobs = rows["target_ids"], rows["target_logprobs"].astype(np.float32)
    drawn = (ids >= 0) & np.isnan(logprobs)
    if drawn.any():
        count = np.maximum(drawn.sum(axis=1, keepdims=True), 1).astype(np.float32)
        logprobs = np.where(drawn, rows["tail_logprob"][:, [column]].astype(np.float32) - np.log(count), logprobs)
    return np.where(ids < 0, np.float32(-np.inf), logprobs)


def to_table(rows: Rows, lengths: NDArray[np.int32], column: int, align: str) -> pa.Table:
    """The samples that lie in `rows` one after the other, as a table with a row for each.

    rows: the arrays of a store, [N, ...]. lengths: of the samples, N together. column: as for `log_weights`
    """
    tokens, ends = rows["tokens"], np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    trained = rows["loss_mask"].copy() if "loss_mask" in rows else np.ones(len(tokens), bool)
    trained[ends - 1] = False  # no token follows
    logprobs = log_weights(rows, column)
    there = np.isfinite(logprobs)
    ids, logprobs = np.where(there, rows["target_ids"], 0), np.where(there, logprobs, np.float32(NOTHING))
    mask = (there & trained[:, None]).astype(np.int8)
    labelled = _moved(trained, starts, False)
    if align == "token":
        ids, logprobs, mask = (
            _moved(part, starts, fill) for part, fill in ((ids, 0), (logprobs, np.float32(NOTHING)), (mask, 0))
        )
    columns = [
        _lists(tokens, ends, pa.int32()),
        _lists(np.ones(len(tokens), np.int8), ends, pa.int8()),
        _lists(np.where(labelled, tokens, IGNORED), ends, pa.int32()),
        *(
            pa.ListArray.from_arrays(_offsets(ends), _lists(part.ravel(), _even(part), kind))
            for part, kind in ((ids, pa.int32()), (logprobs, pa.float32()), (mask, pa.int8()))
        ),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _moved(values: NDArray[Any], starts: NDArray[np.int64], fill: Any) -> NDArray[Any]:
    """Each row at the place of the one after it; `fill` at the first of each sample."""
    moved = np.roll(values, 1, axis=0)
    moved[starts] = fill
    return moved


def _even(values: NDArray[Any]) -> NDArray[np.int64]:
    """Where each row of [N, K] ends among its values."""
    return np.arange(1, len(values) + 1, dtype=np.int64) * int(values.shape[1])


def _offsets(ends: NDArray[np.int64]) -> pa.Array:
    return pa.array(np.append(0, ends), pa.int32())


def _lists(values: NDArray[Any], ends: NDArray[np.int64], kind: Any) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(ends), pa.array(values, kind))
