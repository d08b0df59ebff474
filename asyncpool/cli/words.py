"""Words that the commands have in common."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """`1 statement`, `2 statements`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
