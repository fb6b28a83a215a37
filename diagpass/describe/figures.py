"""Figures for people: bytes, FLOPs, lists of numbers."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["count", "letter", "ranges", "size", "work"]


def size(count: float) -> str:
    """A number of bytes: ``"512 B"``, ``"1.5 kB"``, ``"2.0 GB"`` (powers of 1,000)."""
    return _scaled(count, "B")


def work(count: float) -> str:
    """A number of floating-point operations: ``"33.5 MFLOP"``."""
    return _scaled(count, "FLOP")


def _scaled(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000 or prefix == "P":
            return f"{count:.0f} {unit}" if not prefix else f"{count:.1f} {prefix}{unit}"
        count /= 1000
    raise AssertionError


def count(number: int, word: str) -> str:
    """``count(1, "wave")`` is ``"1 wave"``, ``count(2, "wave")`` is ``"2 waves"``."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def letter(kind: int) -> str:
    """Name a kind: A, B, ..., Z, A1, B1, ..."""
    turn, place = divmod(kind, 26)
    return chr(ord("A") + place) + (str(turn) if turn else "")


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2, 5"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
