"""Merging: techniques, recipes, and the two engines that apply a recipe (streamed and resident)."""
