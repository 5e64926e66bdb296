"""One measured number: whether a latency of one GPU can be, and what it makes of the costs.

Knows the serial schedule, its prediction, and the peak of the GPU. How costs are scaled is decided in
``simulator.costs``; which spec, box and workload the number is of, by whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile
from simulator.costs import CostModel, Scope, StageSeconds
from simulator.gpu import BOOST

FAR = 4.0
"""A latency of so many times its prediction, or of so little, is worth a word. Of published one-GPU runs
nine in ten lie within 25 % of their prediction; eager kernels without flash attention, or clocks held
down, make a factor of two or three."""
OTHER_UNIT = 100.0
"""What is so far off is in another unit: weights that are loaded for each step make a factor of ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured, and what it made of the costs.

    ``predicted_s`` is the time under the same clock without the measurement; ``device_scale`` and
    ``host_scale`` multiply the loop's times on the device and on its host.
    """

    measured_s: float
    scope: Scope
    gpu: str
    predicted_s: float
    device_scale: float
    host_scale: float


def calibrated(
    costs: CostModel,
    serial: ScheduleGraph,
    predicted: StageSeconds,
    measured_s: float,
    scope: Scope,
) -> tuple[CostModel, Calibration]:
    """``costs`` scaled so that ``serial``, predicted to take ``predicted`` on device 0, takes
    ``measured_s`` under a clock of ``scope``, and what has changed.

    Raises ValueError where the device cannot be so fast, or nothing is left for the loop.
    """
    gpu = costs.gpus[0]
    flops, rate = flops_under(scope, costs.profile, serial), BOOST * gpu.roof(costs.dtype)
    if measured_s * rate < flops:
        raise ValueError(
            f"measured latency {measured_s:g} s (scope {scope}): one {gpu.name} takes at least"
            f" {flops / rate:.3g} s, for {flops / 1e12:,.4g} TFLOP at its peak of"
            f" {rate / BOOST / 1e12:,.4g} TFLOP/s in {costs.dtype} and {BOOST - 1:.0%} of boost"
        )
    fitted = costs.calibrated(measured_s, scope, predicted)
    return fitted, Calibration(
        measured_s=measured_s,
        scope=scope,
        gpu=gpu.name,
        predicted_s=predicted.under(scope),
        device_scale=fitted.device_scale / costs.device_scale,
        host_scale=fitted.host_scale / costs.host_scale,
    )


def flops_under(scope: Scope, profile: Profile, serial: ScheduleGraph) -> float:
    """Floating-point operations that a clock of ``scope`` sees of a schedule on one rank."""
    total, in_loop_yet = 0.0, False
    for section in serial.sections:
        for op in section.ops:
            in_loop_yet = in_loop_yet or op.step is not None
            seen = {
                "denoise": op.step is not None,
                "latent": op.step is not None or not in_loop_yet,
            }
            if op.work is not None and seen.get(scope, True):
                shape = op.work.shape._asdict()
                total += section.count * profile.stages[op.work.stage].flops(shape)
    return total


def times_off(measured_s: float, predicted_s: float) -> float:
    """How many times one is the other, the larger over the smaller."""
    return max(measured_s / predicted_s, predicted_s / measured_s)


def doubts(calibration: Calibration) -> Iterator[str]:
    """What to check where measurement and prediction are far apart."""
    measured_s, predicted_s = calibration.measured_s, calibration.predicted_s
    off = times_off(measured_s, predicted_s)
    if off > FAR:
        unit = ", and seconds its unit" if off > OTHER_UNIT else ""
        yield (
            f"{measured_s:.4g} s were measured where {predicted_s:.3g} s are predicted of one"
            f" {calibration.gpu} (x {measured_s / predicted_s:.4g}): check that model, size, steps,"
            f" batch, runtime and --scope are those of that run{unit}"
        )
