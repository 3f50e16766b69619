"""Transforms: rewrites of a model's weights that leave its logits as they are.

A transform is a function (decoder, *, settings) -> Rewrite. It reads no more than it needs to know
how the model is wired; the rewrite is carried out tensor by tensor when they are read. It raises
TransformError, naming what is in its way, for a model that it would change. The result is a plain
model of the same architecture. tests/contract/test_transforms.py holds every entry below to this.
"""

from collections.abc import Callable

from lwquant.model.rewritten import Rewrite
from lwquant.transforms.rotate import rotate

Transform = Callable[..., Rewrite]

TRANSFORMS = {"rotate": rotate}

__all__ = ["TRANSFORMS", "Transform", "rotate"]
