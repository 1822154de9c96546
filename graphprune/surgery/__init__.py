"""Surgery writes: a cut applied to the user's own form of the model. One row per source."""

from __future__ import annotations

from graphprune.program import Program
from graphprune.surgery.cut import Cut


def apply_cut(program: Program, cut: Cut) -> Program:
    """The pruned program; the given one, and the user's model, are left as they were."""
    from graphprune.capture.onnx_file import OnnxSource, capture_onnx
    from graphprune.capture.torch_export import TorchSource

    if isinstance(program.source, TorchSource):
        from graphprune.surgery.torch_graph import apply_cut as cut_graph

        return cut_graph(program, cut)
    assert isinstance(program.source, OnnxSource)
    from graphprune.surgery.onnx_graph import apply_cut as cut_model

    return capture_onnx(cut_model(program, cut), list(program.example_inputs))


__all__ = ["Cut", "apply_cut"]
