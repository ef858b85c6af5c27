"""Channels of coupled groups: what they are worth, and arrays that shrink."""
