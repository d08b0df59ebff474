"""A row of one's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Reading:
    """What a device has sent."""

    device: int
    value: float


QUERY = "select %s::int as device, %s::float8 as value"
