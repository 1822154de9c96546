"""Statistics of a program on data: what scores and repairs are computed from."""

from graphprune.calibration.accumulators import Gradients, Gram, Mean, Moments, Similarity
from graphprune.calibration.batches import batches, first_inputs, flat_inputs, noise, reread, samples
from graphprune.calibration.layerwise import layerwise
from graphprune.calibration.statistics import Statistics, default_loss
from graphprune.calibration.taps import TAPS, tapped, working_dtype

__all__ = [
    "TAPS", "Gradients", "Gram", "Mean", "Moments", "Similarity", "Statistics", "batches", "default_loss", "first_inputs", "flat_inputs",
    "layerwise", "noise", "reread", "samples", "tapped", "working_dtype",
]
