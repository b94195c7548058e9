"""Batches and labels rebuilt from requests."""
