"""`nearfold.mixing.mixing_matrix`: where `nearfold.mixing_matrix` was before `nearfold.look` held all of looking."""

from nearfold.look.mixing import mixing_matrix

__all__ = ["mixing_matrix"]
