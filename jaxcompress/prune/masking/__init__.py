"""Masks: what is compared, in which structure, at which step."""
