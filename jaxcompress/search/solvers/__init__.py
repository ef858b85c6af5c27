"""Solvers of the choice per site."""
