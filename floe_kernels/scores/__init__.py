"""Measure a model: tensors in, ``{name: number}`` out."""

from floe_kernels.scores.collector import FisherCollector
from floe_kernels.scores.fisher import fisher
from floe_kernels.scores.influence import influence
from floe_kernels.scores.record import FisherRecord
from floe_kernels.scores.sensitivity import sample_sensitivity, sensitivity
from floe_kernels.scores.spectral import spectral

__all__ = [
    "FisherCollector",
    "FisherRecord",
    "fisher",
    "influence",
    "sample_sensitivity",
    "sensitivity",
    "spectral",
]
