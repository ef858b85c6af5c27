"""What a network costs on a device: multiply-accumulates, bytes, latency, energy."""

from jaxcompress.cost.device_model import Device, device, device_of_tables, devices, template
from jaxcompress.cost.energies import IdealEnergy, ideal_energy
from jaxcompress.cost.estimation import Counts, counts, estimate
from jaxcompress.cost.relaxed_costs import SoftCost, differentiable
from jaxcompress.cost.report import table
from jaxcompress.cost.result import Cost, Fit, LayerCost
from jaxcompress.cost.timing.board_calibration import (
    Calibration,
    Measured,
    calibrate,
    class_factors,
)
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
