"""Errors, cross-validation, pre-registration and verdict."""
