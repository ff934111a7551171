"""Number of parameters on a process of each pipeline stage, summed over the predicted shapes."""

from dataclasses import dataclass

from megatron_sov.model.config import RunConfig
from megatron_sov.plan.footprint.stage_parameters import list_stage_parameters


@dataclass(frozen=True)
class StageParams:
    """Parameters on one process of a pipeline stage, adapters included."""

    dense: int
    """Parameters of attention, norms, routers, shared experts and embeddings."""
    experts: int
    """Parameters of the routed experts on this process."""
    layers: int
    """Number of layers on this stage, with multi-token prediction layers."""


def count_stage_params(config: RunConfig) -> list[StageParams]:
    """Return the parameters on a process of each pipeline stage."""
    stages = []
    for stage in range(config.parallel.pp):
        numel = {False: 0, True: 0}
        for chunk in list_stage_parameters(config, stage):
            for _, parameters in chunk:
                for part in parameters:
                    numel[part.routed] += part.numel * part.count
        layers = len(config.parallel.stage_layers(stage, config.model.num_layers))
        if stage == config.parallel.pp - 1:
            layers += config.model.num_mtp_layers
        stages.append(StageParams(numel[False], numel[True], layers))
    return stages
