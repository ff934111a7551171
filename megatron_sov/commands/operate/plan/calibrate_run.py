"""Runs `megatron-sov plan --calibrate`."""

from megatron_sov.commands.operate.plan.plan import SpeedCalibration
from megatron_sov.plan.calibration.calibrate import calibrate


def calibrate_speed(request: SpeedCalibration) -> None:
    print(calibrate(request.options.calibrate, request.options.out))
