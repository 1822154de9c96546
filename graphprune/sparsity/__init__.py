"""Zeros inside tensors: patterns, methods, and the masks that a plan holds."""

from graphprune.sparsity.methods import UPDATES, Weights
from graphprune.sparsity.patterns import NOfM, Pattern, Tiles, Unstructured, pattern_of
from graphprune.sparsity.solve import maskable, masked_tensors, masks_after, repair_masked, solve_masks
from graphprune.sparsity.swaps import Swaps

__all__ = [
    "UPDATES", "NOfM", "Pattern", "Swaps", "Tiles", "Unstructured", "Weights", "maskable", "masked_tensors", "masks_after",
    "pattern_of", "repair_masked", "solve_masks",
]
