"""Statistics of a program on data: what scores and repairs are computed from."""

from graphprune.calibration.batches import batches, flat_inputs
from graphprune.calibration.statistics import Statistics, default_loss

__all__ = ["Statistics", "batches", "default_loss", "flat_inputs"]
