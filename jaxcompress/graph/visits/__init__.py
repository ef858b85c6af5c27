"""Visitors at contractions."""
