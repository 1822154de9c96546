"""Dim rules of our own ops: the state-space scans. Positions of the sequence are read one after the other, so that axis is fixed."""

from __future__ import annotations

from collections.abc import Mapping

from graphprune.program import Node, Value
from graphprune.rules.aten_elementwise import Rule
from graphprune.rules.engine import Engine


def _scan(
    engine: Engine, node: Node, x: str, shared: str, per_head: str, states: str, sizes: Mapping[str, int], marks: Mapping[str, str]
) -> None:
    """y = C (B x + what is left of the initial state) + D x, and the final state. Step sizes and A only say how fast it decays."""
    initial = node["initial_state"]
    terms = [f"x[{x}] B[{shared}] C[{shared}]"]
    terms += [f"D[{per_head}] x[{x}]"] * isinstance(node["D"], Value)
    terms += [f"initial_state[{states}] C[{shared}]"] * isinstance(initial, Value)
    decay = f"delta[{x}] A[{per_head} n]" if "delta" in node.args else f"dt[b _ {per_head}] A[{per_head}]"
    engine.spec(f"{' + '.join(terms)} ; {decay} -> {x}, {states}", sizes=sizes, marks={"n": "ssm_state", **marks})
    engine.flows[-1].terms = ((node["x"], node["B"]), *([(initial,)] if isinstance(initial, Value) else ()))  # C and D only read the state


def selective_scan(engine: Engine, node: Node) -> None:
    _scan(engine, node, "b d _", "b n _", "d", "b d n", {}, {})


def ssd_scan(engine: Engine, node: Node) -> None:
    groups = node["B"].shape[2]
    sizes = {"g": groups, "q": node["x"].shape[2] // groups}
    _scan(engine, node, "b _ (g q) p", "b _ g n", "(g q)", "b (g q) p n", sizes, {"g": "ssm_head", "q": "ssm_head", "p": "head_dim"})


def gated_delta_rule(engine: Engine, node: Node) -> None:
    """y = query (key (beta value) + what is left of the initial state); the decay only says how much is left."""
    initial, groups = node["initial_state"], node["key"].shape[2]
    terms = ["query[b _ g k] key[b _ g k] value[b _ (g r) v] beta[b _ (g r)]"]
    terms += ["initial_state[b (g r) k v] query[b _ g k]"] * isinstance(initial, Value)
    sizes = {"g": groups, "r": node["value"].shape[2] // groups}
    marks = {"g": "kv_group" if sizes["r"] > 1 else "head", "r": "head", "k": "head_dim", "v": "head_dim"}
    engine.spec(f"{' + '.join(terms)} ; decay[b _ (g r)] -> b _ (g r) v, b (g r) k v", sizes=sizes, marks=marks)
    engine.flows[-1].terms = ((node["key"], node["value"], node["beta"]), *([(initial,)] if isinstance(initial, Value) else ()))


SCANS: dict[str, Rule] = {"selective_scan": selective_scan, "ssd_scan": ssd_scan, "gated_delta_rule": gated_delta_rule}
