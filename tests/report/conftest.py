"""Fixtures of the report's tests."""

from small_book import make_small_book

__all__ = ["make_small_book"]
