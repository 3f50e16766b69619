"""Carry out a transform and check, on a few tokens, that the logits stay the same."""

from __future__ import annotations

import torch
from torch import Tensor

from lwquant.errors import TransformError
from lwquant.model.decoder import Decoder
from lwquant.model.rewritten import RewrittenSource
from lwquant.transforms import Transform

CHECKED = (2, 32)  # windows and tokens, drawn at random
# Root mean square of the change over that of the logits less their mean of each token, in float32.
TOLERANCE = 1e-4


@torch.no_grad()
def transformed(decoder: Decoder, transform: Transform) -> tuple[Decoder, tuple[str, ...]]:
    """The decoder of the transformed checkpoint, and what is to be noted about it.

    Raises TransformError where the logits differ by more than TOLERANCE.
    """
    rewrite = transform(decoder)
    result = Decoder.open(RewrittenSource(decoder.source, rewrite), decoder.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(decoder.vocab_size, CHECKED, generator=generator)
    change = relative_change(*(d.head(d.last_hidden(tokens)) for d in (decoder, result)))
    if not change <= TOLERANCE:
        raise TransformError(
            f"{type(decoder.model).__name__}: the transform {rewrite.label!r} changes the logits "
            f"by {change:.2g}, at most {TOLERANCE:.0e} is allowed"
        )
    return result, rewrite.notes


def relative_change(before: Tensor, after: Tensor) -> float:
    """Change of logits (..., vocab), relative to what tells tokens apart in them."""
    centred = before - before.mean(-1, keepdim=True)
    return ((after - before).norm() / centred.norm()).item()
