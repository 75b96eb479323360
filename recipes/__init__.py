"""Recipes: whole small studies, each a file with its settings at the top. `python -m recipes.denoise --help`."""
