"""Facts that decide, and the verdict of a backend about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfold.grammar import Basic


@dataclass(frozen=True)
class Facts:
    """Everything a backend may look at: static, never the data."""

    op: Basic
    ndim: int
    dtype: torch.dtype
    device: str
    grad: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a backend runs an operation, why, and how it equals the oracle: "bitwise", to "roundoff", by "recall".

    ``keys``: whether it heeds a mask that says which positions are there.
    """

    ok: bool
    reason: str
    exactness: str = ""
    keys: bool = True

    @staticmethod
    def yes(reason: str, exactness: str, keys: bool = True) -> Verdict:
        """It runs."""
        return Verdict(True, reason, exactness, keys)

    @staticmethod
    def no(reason: str) -> Verdict:
        """It does not."""
        return Verdict(False, reason)
