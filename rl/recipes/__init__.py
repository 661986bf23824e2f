"""Recipes. A recipe file says which paper it is, which choices it makes, and what it departs from.

A recipe is a class of options with a `build()` that picks an estimator, an advantage and a loss. Importing this package
needs no torch.
"""

from rl.registry import DEFAULT, RECIPES, options_class, parse_options

__all__ = ["DEFAULT", "RECIPES", "options_class", "parse_options"]
