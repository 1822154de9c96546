"""CFSP: how far a layer turns what passes it says how much it keeps; the norm of their activations says which channels stay.

The paper's code multiplies that norm by weights relative to the model axis, which cancel exactly: see `RelativeActivation`.
"""

from graphprune.allocation.curves import Sigmoid
from graphprune.importance.activations import relative_activation
from graphprune.recipes.recipe import Recipe

RECIPES = (
    Recipe(
        name="cfsp",
        paper="Wang et al. 2024, arXiv 2409.13199",
        formula="||x|| * (relative |W_down| ||x|| + relative |W_up| + relative |W_gate|)",
        score=relative_activation,
        unit=("neuron",),
        allocation=Sigmoid(),
        deviations="the curve's scale does not depend on the number of tokens (the paper's at 131072); no LoRA afterwards; kept channels "
        "are multiples of round_to, rounded up",
    ),
)
