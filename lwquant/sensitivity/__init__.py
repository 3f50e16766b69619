"""Sensitivity metrics: what storing each linear in each scheme costs the model.

A metric is a function (decoder, tokens, schemes, quantizer, *, settings, progress) -> Measurement
with costs (n_linears, n_schemes) that are finite, ≥ 0, 0 for 16 bits and for a zero weight, and do
not depend on the order of the samples. Costs are comparable within one report only.
tests/contract/test_metrics.py holds every entry below to this.
"""

from collections.abc import Callable

from lwquant.sensitivity.augmented_hessian import augmented_hessian
from lwquant.sensitivity.delta_loss import delta_loss
from lwquant.sensitivity.embedding_delta import embedding_delta
from lwquant.sensitivity.fisher import fisher
from lwquant.sensitivity.hessian import hessian
from lwquant.sensitivity.measured_kl import measured_kl
from lwquant.sensitivity.measurement import Measurement
from lwquant.sensitivity.outlier_count import outlier_count
from lwquant.sensitivity.output_error import output_error
from lwquant.sensitivity.relevance import relevance

Metric = Callable[..., Measurement]

METRICS = {
    "embedding_delta": embedding_delta,
    "outlier_count": outlier_count,
    "hessian": hessian,
    "output_error": output_error,
    "relevance": relevance,
    "delta_loss": delta_loss,
    "fisher": fisher,
    "augmented_hessian": augmented_hessian,
    "measured_kl": measured_kl,
}

# Those whose costs are KL to the original in nats per token, and add up to a plan's.
KL_METRICS = frozenset({"fisher", "augmented_hessian", "measured_kl"})

__all__ = [
    "KL_METRICS",
    "METRICS",
    "Measurement",
    "Metric",
    "augmented_hessian",
    "delta_loss",
    "embedding_delta",
    "fisher",
    "hessian",
    "measured_kl",
    "outlier_count",
    "output_error",
    "relevance",
]
