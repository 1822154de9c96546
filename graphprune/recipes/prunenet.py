"""PruneNet: a small policy, trained on weights alone, keeps the channels that keep the spectrum of the first feed-forward matrix."""

from graphprune.importance.policy import SpectrumPolicy
from graphprune.recipes.recipe import Recipe

RECIPES = (
    Recipe(
        name="prunenet",
        paper="Sengupta et al. 2025, arXiv 2501.15296",
        formula="sigmoid((W P^T + b) s), learned with the reward 1 / KS(singular values)",
        score=SpectrumPolicy(),
        unit=("neuron",),
        data=False,
        deviations="the units of highest probability stay, none are drawn at the end; learned at ratio 0.25, whatever is asked for; no "
        "gradient clipping, no KL term, no LoRA afterwards",
    ),
)
