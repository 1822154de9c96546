"""Published methods as compositions of unit, score, allocation and repair. None is registered yet: see the changelog."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, Any] = {}
