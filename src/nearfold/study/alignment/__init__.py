"""Measures of a data set in the three words, from its training images, and the operators they point to.

See docs/alignment.md.
"""

from __future__ import annotations

from nearfold.study.alignment.positions import Positions, positions
from nearfold.study.alignment.profile import Measure, Profile, measure
from nearfold.study.alignment.recommend import confidence, features, points, score, scores

__all__ = [
    "Measure",
    "Positions",
    "Profile",
    "confidence",
    "features",
    "measure",
    "points",
    "positions",
    "score",
    "scores",
]
