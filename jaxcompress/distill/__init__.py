"""Distillation losses."""

from jaxcompress.distill.logits import kd

__all__ = ["kd"]
