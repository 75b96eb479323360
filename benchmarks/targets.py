"""What is to be reached, as data, and how far the measurements are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.case import OURS

Entry = dict[str, Any]  # one measured case, as `run.measure_case` writes it


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        case: which case.
        peer: against whom; with "growth" another case.
        what: forward, both (forward + backward) or memory.
        bound: the least speedup, peer / ours; or with ``most`` the largest cost, ours / peer.
        most: whether it is a cost.
    """

    case: str
    peer: str
    what: str
    bound: float
    most: bool = False


def _no_slower(case: str, peer: str, forward: float, both: float | None = None) -> list[Target]:
    found = [Target(case, peer, "forward", forward, most=True)]
    return found if both is None else [*found, Target(case, peer, "both", both, most=True)]


def _faster(case: str, peer: str, forward: float, both: float) -> list[Target]:
    return [Target(case, peer, "forward", forward), Target(case, peer, "both", both)]


NAIVE = {
    "knn": "naive",
    "knn_k36": "naive",
    "convnn_attention": "naive",
    "kvt": "naive",
    "convnn": "naive",
    "convnn_k36": "naive",
    "convnn_random": "naive",
    "convnn_memory": "naive",
    "acmix": "unfold",
}
TARGETS: list[Target] = [
    *_faster("knn", "SDPA", 2.7, 7),
    *_faster("knn_k36", "SDPA", 1.5, 4),
    *_faster("knn_16384", "SDPA", 4, 11),
    Target("knn_16384", "knn", "growth", 4.4, most=True),  # O(N k): four times the positions, and a tenth for rounding
    *_faster("convnn_attention", "nn.MultiheadAttention", 1.0, 1.2),
    *_faster("kvt", "nn.MultiheadAttention", 1.0, 2.5),
    *_faster("kvt", "naive", 6, 8),
    *_faster("convnn", "naive", 6, 4.5),
    Target("convnn", "nn.Conv2d 3x3", "both", 3.5, most=True),
    *_faster("convnn_k36", "naive", 6, 4.5),
    *_faster("convnn_random", "naive", 4, 4),
    *_faster("acmix", "unfold", 9, 9),
    Target("acmix", "nn.Conv2d 3x3", "forward", 8, most=True),
    Target("acmix", "nn.Conv2d 3x3", "both", 8, most=True),
    *_faster("neighbourhood_56", "unfold", 15, 15),
    *_faster("neighbourhood_inside", "unfold", 15, 15),
    *_faster("deformable", "grid_sample", 5, 5),
    *_faster("deformable_v2", "grid_sample", 5, 5),
    *_faster("deformable_layer", "grid_sample", 5, 5),
    *_faster("deformable_attention", "grid_sample", 3, 4),
    *_faster("deformable_attention_4", "grid_sample", 3, 4),
    *_faster("scan", "loop over time", 20, 20),
    Target("scan", "associative scan", "forward", 3),
    *_faster("gated_delta_rule", "loop over time", 30, 30),
    *_faster("gated_delta_rule", "chunks of matrix products", 2, 2),
    Target("points", "scikit-learn trees by cloud", "forward", 1.5),
    Target("points", "matmul + topk by cloud", "forward", 4),
    Target("full_kernel", "direct depthwise", "forward", 3),
    Target("full_kernel", "torch.fft", "both", 1),
    *_faster("entmax", "sort", 3, 3),
    *_faster("conv_tax", "nn.Conv2d 3x3", 0.97, 0.97),
    *_faster("attention_tax", "nn.MultiheadAttention", 0.97, 0.97),
    *_faster("union", "SDPA, dense mask", 8, 12),
    *_faster("indexed", "SDPA", 2, 4),
    *_faster("blocks", "SDPA, causal", 6, 10),
    *_no_slower("small_mixer", "nn.Conv2d 3x3", 1.15, 1.1),
    *_no_slower("small_convnn2d", "nn.Conv2d 3x3", 2, 1.7),
    *_no_slower("small_branchingconv2d", "nn.Conv2d 3x3", 3, 2.5),
    *_no_slower("small_acmix2d", "nn.Conv2d 3x3", 3, 3),
    *_no_slower("small_deformconv2d", "nn.Conv2d 3x3", 2, 2.5),
    *_no_slower("small_selfattention", "nn.MultiheadAttention", 1.1),
    *_no_slower("small_convnnattention", "nn.MultiheadAttention", 1.3),
    *(Target(case, peer, "memory", 0.1, most=True) for case, peer in NAIVE.items()),
]

FIELDS = {"forward": "forward_ms", "both": "both_ms", "memory": "peak_mib", "growth": "peak_mib"}
WORDS = {
    "forward": "forward",
    "both": "forward + backward",
    "memory": "peak extra memory",
    "growth": "peak extra memory",
}


def _number(cases: dict[str, Entry], case: str, who: str, what: str) -> float | None:
    rows = {row["who"]: row for row in cases[case]["rows"]} if case in cases else {}
    return rows.get(who, {}).get(FIELDS[what])


def measured(target: Target, cases: dict[str, Entry]) -> float | None:
    """The measured ratio, in the sense of the target's bound; None where it was not measured."""
    ours = _number(cases, target.case, OURS, target.what)
    other = (target.peer, OURS) if target.what == "growth" else (target.case, target.peer)
    theirs = _number(cases, *other, target.what)
    if not ours or not theirs:
        return None
    return ours / theirs if target.most else theirs / ours


def met(target: Target, ratio: float) -> bool:
    """Whether a ratio reaches the target."""
    return ratio <= target.bound if target.most else ratio >= target.bound


def verdict(target: Target, cases: dict[str, Entry]) -> tuple[str, str, str]:
    """The target, what was measured, and "met" or "missed"."""
    cost = "the memory" if target.what in ("memory", "growth") else "the time"
    asked = f"at most {target.bound:g}x {cost}" if target.most else f"at least {target.bound:g}x as fast"
    ratio = measured(target, cases)
    if ratio is None:
        return asked, "", "not measured"
    return asked, f"{ratio:.3f}x" if ratio < 0.2 else f"{ratio:.2f}x", "met" if met(target, ratio) else "missed"
