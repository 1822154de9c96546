"""Measurements on disk: one small file each, replaced as a whole, so any number of processes may write at once.

They lie in `$GRAPHPRUNE_CACHE` (default `~/.cache/graphprune`), in a folder by kind, below it one by place: device and versions. Another
GPU, driver library or version of torch starts afresh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

log = logging.getLogger("graphprune")

T = TypeVar("T")


class Cache(Generic[T]):
    """Entries of one kind, measured at one place.

    Args:
        made: the dataclass of an entry; it is made again from the fields in the file, so it refuses what it cannot be.
        kind: what is measured, as in "gate".
        place: device and versions.
        root: in place of the folder of the environment.
    """

    def __init__(self, made: type[T], kind: str, place: str, root: Path | None = None) -> None:
        default = Path(os.environ.get("GRAPHPRUNE_CACHE", Path.home() / ".cache" / "graphprune"))
        self.made, self.kind = made, kind
        self.folder = (root or default) / kind / re.sub(r"[^\w.+-]+", "_", place)

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def get(self, key: str) -> T | None:
        """The entry, or None where there is none that can be read."""
        try:
            entry = json.loads(self._file(key).read_text())
            return self.made(**entry["measurement"]) if entry["key"] == key else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            log.warning("%s: the measurement %r in %s is unreadable (%s) and is ignored", self.kind, key, self._file(key), problem)
            return None

    def put(self, key: str, measurement: T) -> None:
        """Writes one entry. A folder that cannot be written costs a measurement in the next run, not this one."""
        fields: dict[str, Any] = dataclasses.asdict(measurement)  # type: ignore[call-overload]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "measurement": fields}, file)
            os.replace(name, self._file(key))
        except OSError as problem:
            log.warning("%s: measurements are not kept, %s cannot be written: %s", self.kind, self.folder, problem)

    def entries(self) -> Iterator[tuple[str, T]]:
        """All readable entries, in the order of their keys."""
        found: dict[str, T] = {}
        for file in self.folder.glob("*.json"):
            try:
                entry = json.loads(file.read_text())
                found[entry["key"]] = self.made(**entry["measurement"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        yield from sorted(found.items(), key=lambda item: item[0])
