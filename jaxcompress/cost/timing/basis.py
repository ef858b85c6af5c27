"""What an estimate rests on: the fit of a device file, and how far off the latency may be."""

import math
from typing import NamedTuple

from jaxcompress.cost.device_model import Device, Rate
from jaxcompress.cost.timing.board_calibration import error_bound
from jaxcompress.cost.timing.roofline import Load

IN_FITTED_VERSION = 0.60
"""Half-width, as |log|, where the file has a fit without an error of its own: the 90 % quantile
for a board without a measurement of its own (`calibrate.error_bound(0)`, MLPerf Tiny, rounded)."""

WITHOUT_FIT = math.log(3)
"""Half-width, as |log|, where no network was measured: a factor of 3, assumed, not measured."""


class Basis(NamedTuple):
    """What a latency rests on.

    Attributes:
      spread: |log(measured / estimated)| of the interval.
      note: the networks or the lack of them, and the source of the spread.
    """

    spread: float
    note: str


def basis(device: Device) -> Basis:
    """The spread of a device's latencies and a sentence that says what they rest on."""
    fit, version = device.fit, device.version or "of unknown version"
    runs = f"runtime {device.runtime} {version}"
    if device.calibrated:
        spread = error_bound(device.calibrated)
        return Basis(
            spread,
            f"{runs}: calibrated by {device.calibrated} measurements of the device; the interval "
            f"is a factor of {math.exp(spread):.3g} (90 % of networks left out, on boards so "
            "calibrated). Another version or runtime is not covered",
        )
    if fit is None:
        factor = math.exp(WITHOUT_FIT)
        return Basis(
            WITHOUT_FIT,
            f"{runs}: the file names no fit to measured networks; the interval is a factor of "
            f"{factor:.3g}, assumed",
        )
    if fit.error is None:
        spread, why = IN_FITTED_VERSION, "90 % of boards without a measurement of their own"
    else:
        spread, why = fit.error.value, f"{fit.error.grade}: {fit.error.source}"
    return Basis(
        spread,
        f"{runs}: fitted on {', '.join(fit.networks)}; the interval is a factor of "
        f"{math.exp(spread):.3g} ({why}). Another version or runtime is not covered",
    )


def outside(device: Device, load: Load, rate: Rate | None) -> str:
    """Why a contraction is not within the fit; "" if it is, or if there is no contraction."""
    if not load.op or device.fit is None:
        return "the device file names no fit" if load.op else ""
    if load.op not in device.fit.kinds:
        return f"no {load.op} in the fit"
    if rate is None or rate.op != load.op and (load.op, rate.op) != ("pointwise", "conv"):
        return f"no rate for {load.op}"
    if rate.weight not in device.fit.types:
        return f"no {rate.weight} in the fit"
    low, high = device.fit.macs
    each = load.macs / max(load.calls, 1)
    if not low <= each <= high:
        return f"{each:.3g} MAC are outside the fit ({low:.3g} to {high:.3g})"
    return ""
