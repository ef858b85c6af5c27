"""Contractions as layers: matrices, biases, views of leaves, statistics of inputs."""
