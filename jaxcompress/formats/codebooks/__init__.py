"""Codebooks."""
