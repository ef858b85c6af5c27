"""Pruning from calibration data, layer by layer."""
