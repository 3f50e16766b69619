"""Token importance: how much each calibration token counts in the statistics of a block.

An importance is a function (view, *, settings) -> scores (n_samples, seq_len), larger where a token
matters more; only their order and spacing within a window count, see weights.py. The scores of a
window move with it when the windows are given in another order, and nothing is changed.
tests/contract/test_importance.py holds every entry below to this.

The family is from Sung, Yadav, Li, Yoon, Bansal, "RSQ: Learning from Important Tokens Leads to
Better Quantized LLMs", arXiv:2503.01820.
"""

from lwquant.importance.activation_difference import activation_difference
from lwquant.importance.activation_norm import activation_norm
from lwquant.importance.attention_concentration import attention_concentration
from lwquant.importance.positions import positions
from lwquant.importance.token_frequency import token_frequency
from lwquant.importance.token_similarity import token_similarity
from lwquant.importance.view import BlockView, Importance
from lwquant.importance.weights import TokenWeighting, token_weights

IMPORTANCES = {
    "attention_concentration": attention_concentration,
    "activation_norm": activation_norm,
    "activation_difference": activation_difference,
    "token_frequency": token_frequency,
    "token_similarity": token_similarity,
    "positions": positions,
}

__all__ = [
    "IMPORTANCES",
    "BlockView",
    "Importance",
    "TokenWeighting",
    "activation_difference",
    "activation_norm",
    "attention_concentration",
    "positions",
    "token_frequency",
    "token_similarity",
    "token_weights",
]
