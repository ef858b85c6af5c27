"""Scales and shifts that migrate between layers."""
