"""The report of a compile and its tables."""

from graphprune.report.record import (
    Footprint,
    Frozen,
    GroupSummary,
    KernelChoice,
    Latency,
    LayerCost,
    PassRecord,
    Report,
    TensorChange,
    changes,
)

__all__ = ["Footprint", "Frozen", "GroupSummary", "KernelChoice", "Latency", "LayerCost", "PassRecord", "Report", "TensorChange", "changes"]
