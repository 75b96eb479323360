"""Examining a network: where every layer really looks, on images of one's own."""

from nearfold.examine.report import XRay, XRayLayer
from nearfold.examine.xray import xray

__all__ = ["XRay", "XRayLayer", "xray"]
