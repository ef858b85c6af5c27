"""Packed checkpoints."""
