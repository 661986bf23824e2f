"""Published model families, one short file each: how their config.json and tensor names translate into ours.

A family is data and two functions on dicts. To add one: write its file, put it into `FAMILIES`, add a row to
docs/models.md and a layout to tests/test_families.py. No torch at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.models.families.dream import DREAM
from rl.models.families.family import Family
from rl.models.families.llada import LLADA
from rl.models.families.sdar import SDAR

FAMILIES = {family.name: family for family in (LLADA, DREAM, SDAR)}


def family_of(described: Mapping[str, Any]) -> Family | None:
    """The family of a published config.json, None when it is no published one."""
    return next((f for f in FAMILIES.values() if f.model_type == described.get("model_type")), None)
