"""Searching: the space of recipes, the objective, the optimiser, the trial log, and the loop around them."""
