"""Training with masks."""
