"""What a network costs on a device: multiply-accumulates, bytes, latency, energy."""

from jaxcompress.cost.calibrate import Calibration, Measured, calibrate, class_factors
from jaxcompress.cost.device import Device, device, device_of_tables, devices, template
from jaxcompress.cost.differentiable import SoftCost, differentiable
from jaxcompress.cost.energy import IdealEnergy, ideal_energy
from jaxcompress.cost.estimate import Counts, counts, estimate
from jaxcompress.cost.report import table
from jaxcompress.cost.result import Cost, Fit, LayerCost
from jaxcompress.cost.training import estimate_training

__all__ = [
    "Calibration",
    "Cost",
    "Counts",
    "Device",
    "Fit",
    "IdealEnergy",
    "LayerCost",
    "Measured",
    "SoftCost",
    "calibrate",
    "class_factors",
    "counts",
    "device",
    "device_of_tables",
    "devices",
    "differentiable",
    "estimate",
    "estimate_training",
    "ideal_energy",
    "table",
    "template",
]
