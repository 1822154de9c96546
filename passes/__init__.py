"""All passes by the name under which a pipeline calls them. A new one is a file and a line here."""

from graphprune.pass_manager import Pass
from graphprune.passes.cleanup import CleanupPass
from graphprune.passes.structured import ApplyPlanPass, StructuredPass
from graphprune.passes.verify import VerifyPass

PASSES: dict[str, type[Pass]] = {each.name: each for each in (StructuredPass, ApplyPlanPass, CleanupPass, VerifyPass)}
