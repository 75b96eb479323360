"""Networks built around one exchangeable mixing layer."""

from nearfold.models.small import SpectrumNet, stem_stride

__all__ = ["SpectrumNet", "stem_stride"]
