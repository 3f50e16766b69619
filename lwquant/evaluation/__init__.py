"""What a model is worth: perplexity, divergence from its reference, tasks, and pictures of them."""

from lwquant.evaluation.evaluate import Evaluation, evaluate
from lwquant.evaluation.evaluate_tasks import TaskEvaluation, evaluate_tasks

__all__ = ["Evaluation", "TaskEvaluation", "evaluate", "evaluate_tasks"]
