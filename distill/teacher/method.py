"""capture.method: which of a distribution's ids are kept."""

import torch
from torch import Tensor

from distill.config.generate import CaptureConfig
from distill.teacher.capture import Captured, conclude, reduce
from distill.teacher.sample import sample
from distill.teacher.share import Share


@torch.inference_mode()
def capture(
    logits: Tensor, settings: CaptureConfig, next_ids: Tensor, u: Tensor, share: Share | None = None
) -> Captured | None:
    """What is kept of logits ([N, W] float32, overwritten), on the first worker of `share`; None on the others.

    share: whose shard of the vocabulary the logits are of; without one they are of all ids. next_ids: [N] int64, the
    ids that follow, -1 where none does. u: [N] float64, of `sample.uniforms`; only a sample needs it.
    Where a row has a logit that is NaN or +inf, its logsumexp is not finite.
    """
    share = share or Share()
    if settings.method == "sample":
        return sample(logits, settings.k, next_ids, u, share)
    shards = share.collect(reduce(logits, settings.k, settings.temperatures, next_ids, share.first_id), settings.k)
    return conclude(shards, settings.k, settings.temperatures) if shards else None
