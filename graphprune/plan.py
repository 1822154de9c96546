"""A `Plan` is decisions only: which units go, and which single weights. It is the only thing handed from planning to surgery."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from graphprune.blocks import named_blocks
from graphprune.errors import InvalidInput
from graphprune.files import atomic_path
from graphprune.program import Program, Value
from graphprune.units import Group

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What is removed from one group, and how to find that group again in another capture of the network."""

    size: int
    removed: tuple[int, ...]
    kind: str
    members: tuple[tuple[str, int, tuple[int, ...], str], ...]  # (tensor, axis, shape, content hash)


@dataclass(frozen=True)
class Plan:
    """Removed units by group name, and masks of weights. Prints, hashes, saves; applies to the torch module, its ONNX file, or a fine-tuned
    checkpoint.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    repair: tuple[str, ...] = ()  # names of repairs that were part of the decision; apply() runs them again when given data
    settings: Mapping[str, Any] = field(default_factory=dict)  # how the plan was made; no effect on surgery
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)  # weight name -> bool, its shape, True where a weight stays

    @classmethod
    def of(
        cls, program: Program, removed: Mapping[str, Iterable[int]], repair: Iterable[str] = (), settings: Mapping[str, Any] | None = None
    ) -> Plan:
        """The plan that removes these units of the groups of `program`; the name of a block, as its unit 0, is that of all its branches.

        Raises:
            InvalidInput: a group of this name does not exist or has fewer units.
        """
        groups = program.analysis.by_name
        blocks = named_blocks(program) if any(name not in groups for name in removed) else {}
        entries = {}
        wanted = {key: tuple(sorted(set(map(int, units)))) for key, units in removed.items()}
        for name, units in ((part, units) for key, units in wanted.items() for part in blocks.get(key, [key])):
            if name not in groups:
                raise InvalidInput(f"no group or block is named {name!r}; `graphprune inspect` lists the names")
            group = groups[name]
            if units and not (0 <= units[0] and units[-1] < group.size):
                raise InvalidInput(f"group {name!r} has units 0..{group.size - 1}, found unit {units[0] if units[0] < 0 else units[-1]}")
            if units:
                entries[name] = Entry(group.size, units, group.kind, tuple(_signature(m.value, m.axis) for m in group.members))
        return cls(entries, tuple(repair), dict(settings or {}))

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """Group name -> removed units."""
        return {name: entry.removed for name, entry in self.entries.items()}

    @cached_property
    def hash(self) -> str:
        """Hash of the decisions: equal for equal cuts of equally named groups."""
        text = json.dumps([[name, e.size, e.removed] for name, e in sorted(self.entries.items())])
        digest = hashlib.sha256(text.encode())
        for name in sorted(self.masks):  # one at a time: they may lie in files
            mask = self.masks[name]
            digest.update(f"{name} {tuple(mask.shape)}".encode() + _packed(mask).numpy().tobytes())
        return digest.hexdigest()[:16]

    def resolve(self, program: Program) -> dict[str, tuple[int, ...]]:
        """Removed units by the group names of another capture: groups are matched by the name of a member, then by shape, axis and content.

        Raises:
            InvalidInput: a group of the plan has no counterpart.
        """
        groups = program.analysis.groups
        by_member: dict[tuple[str, int], list[Group]] = {}
        for group in groups:
            for member in group.members:
                by_member.setdefault((member.tensor, member.axis), []).append(group)
        for alias, name in program.aliases.items():
            for (tensor, axis), found in list(by_member.items()):
                if tensor == name:
                    by_member[alias, axis] = found
        by_content: dict[tuple, list[Group]] | None = None
        out: dict[str, tuple[int, ...]] = {}
        for name, entry in self.entries.items():
            candidates = [g for g in groups if g.name == name and g.size == entry.size and _same_members(g, entry)]
            if not candidates:
                candidates = _common([by_member.get((t, a), []) for t, a, _, _ in entry.members], entry)
            if not candidates:
                if by_content is None:
                    by_content = {}
                    for group in groups:
                        for member in group.members:
                            by_content.setdefault(_signature(member.value, member.axis)[1:], []).append(group)
                candidates = _common([by_content.get((a, s, h), []) for _, a, s, h in entry.members], entry)
            if not candidates:  # another export may hold the weight transposed
                candidates = [g for g in groups if g.name == name and g.size == entry.size]
            if not candidates:
                raise InvalidInput(
                    f"group {name!r} of the plan ({entry.size} units, first member {entry.members[0][0]!r}) has no counterpart in this "
                    "network; is it the network that the plan was made for?"
                )
            out[candidates[0].name] = entry.removed
        return out

    def to_json(self) -> str:
        """The plan as `save` writes it."""
        record = {
            "graphprune_plan": FORMAT,
            "hash": self.hash,
            "repair": list(self.repair),
            "settings": dict(self.settings),
            "masks": {name: list(mask.shape) for name, mask in self.masks.items()},
            "groups": {
                n: {"size": e.size, "kind": e.kind, "removed": list(e.removed), "members": [list(m) for m in e.members]}
                for n, e in self.entries.items()
            },
        }
        return json.dumps(record, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically; masks go as bits into `<name>.masks.safetensors` beside it."""
        with atomic_path(path) as temporary:
            if self.masks:
                _write_masks(self.masks, _beside(temporary), self.hash)
            temporary.write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            InvalidInput: the file is not a plan, or of a newer format, or its masks are missing.
        """
        path = Path(path)
        try:
            record = json.loads(Path(path).read_text())
            assert record["graphprune_plan"] == FORMAT
            entries = {
                n: Entry(g["size"], tuple(g["removed"]), g["kind"], tuple((t, a, tuple(s), h) for t, a, s, h in g["members"]))
                for n, g in record["groups"].items()
            }
            shapes = record.get("masks", {})
            packed = load_file(_beside(path)) if shapes else {}
            masks = {name: _unpacked(packed[name], shape) for name, shape in shapes.items()}
        except (OSError, ValueError, KeyError, TypeError, AssertionError, SafetensorError) as error:
            raise InvalidInput(f"{path} is not a graphprune plan (format {FORMAT}): {type(error).__name__}: {error}") from error
        plan = cls(entries, tuple(record["repair"]), record["settings"], masks)
        if masks and plan.hash != record["hash"]:
            raise InvalidInput(f"{_beside(path)} does not hold the masks of {path}: hash {plan.hash}, expected {record['hash']}")
        return plan

    def __str__(self) -> str:
        rows = [f"plan {self.hash}: {len(self.entries)} groups"]
        rows += [f"  {name}: {e.size} -> {e.size - len(e.removed)} ({e.kind})" for name, e in self.entries.items()]
        rows += [f"  {name}: {1 - float(mask.float().mean()):.1%} zeros" for name, mask in self.masks.items()]
        return "\n".join(rows)


class SavedMasks(Mapping[str, torch.Tensor]):
    """Masks of a plan that was saved, each read when it is asked for.

    Args:
        path: of the plan; shapes: of the masks, by name.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path, self._shapes = _beside(path), dict(shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        with safe_open(self._path, framework="pt") as file:
            return _unpacked(file.get_tensor(name), shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".masks.safetensors")


def _write_masks(masks: Mapping[str, torch.Tensor], path: Path, plan: str) -> None:
    """A safetensors file of packed masks, of which one is in memory at a time: they may lie in files."""
    header: dict[str, Any] = {"__metadata__": {"plan": plan}}
    end = 0
    for name, mask in masks.items():
        start, end = end, end - (-mask.numel() // 8)
        header[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for mask in masks.values():
            file.write(_packed(mask).numpy().tobytes())


def _packed(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(bits: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    shape = tuple(shape)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool)).reshape(shape)


def _signature(value: Value, axis: int) -> tuple[str, int, tuple[int, ...], str]:
    return value.name, axis, tuple(value.shape or ()), content_hash(value.tensor)


def content_hash(tensor: torch.Tensor | None) -> str:
    """A short hash of a few evenly spaced entries: enough to tell the weights of one network apart; empty on the meta device."""
    if tensor is None or tensor.device.type == "meta" or tensor.numel() == 0:
        return ""
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32).contiguous()
    return hashlib.sha256(picked.numpy().tobytes()).hexdigest()[:12]


def _same_members(group: Group, entry: Entry) -> bool:
    names = {(m.tensor, m.axis) for m in group.members}
    return any((t, a) in names for t, a, _, _ in entry.members)


def _common(found: list[list[Group]], entry: Entry) -> list[Group]:
    """Groups that share the most members with an entry, of its size and kind first."""
    votes: dict[int, int] = {}
    groups = {id(g): g for candidates in found for g in candidates if g.size == entry.size}
    for candidates in found:
        for group in {id(g) for g in candidates if g.size == entry.size}:
            votes[group] = votes.get(group, 0) + 1
    ranked = sorted(votes, key=lambda g: (-votes[g], groups[g].kind != entry.kind))
    return [groups[g] for g in ranked]
