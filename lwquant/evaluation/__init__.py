"""What a model is worth: perplexity, divergence from its reference, and pictures of both."""

from lwquant.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
