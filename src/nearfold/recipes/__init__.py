"""Whole small studies, each a file with its settings at the top. `python -m nearfold.recipes.denoise --help`."""
