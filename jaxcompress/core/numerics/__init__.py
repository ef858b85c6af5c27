"""Numerical cores: selection, counting, sweeps."""
