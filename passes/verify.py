"""The full certificate: the network as it is now against its reference, on several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphprune.pass_manager import Pass, State, Step


@dataclass(frozen=True)
class VerifyPass(Pass):
    """Certify the last cut and everything since. A failure ends the pipeline."""

    name: ClassVar[str] = "verify"
    inputs: int = 3  # random inputs to compare on

    def steps(self, state: State) -> Sequence[Step]:
        return ()

    def apply(self, state: State, steps: Sequence[Step]) -> State:
        return state.certified(range(self.inputs))
