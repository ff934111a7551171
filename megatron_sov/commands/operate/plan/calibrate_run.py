"""Runs `megatron-sov plan --calibrate`."""

from megatron_sov.commands.operate.plan.plan import SpeedCalibration
from megatron_sov.plan.speed.calibration import calibrate_from_runs


def calibrate_speed(request: SpeedCalibration) -> None:
    print(calibrate_from_runs(request.options.calibrate, request.options.out))
