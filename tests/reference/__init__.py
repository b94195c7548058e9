"""Slow, plain second opinions, written from the formulas and not from the package."""
