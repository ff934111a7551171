"""Runs `megatron-sov serve`."""

from megatron_sov.commands.models.serve import ServeRequest
from megatron_sov.infer.engines.target import find_target
from megatron_sov.serve.run import serve


def serve_target(request: ServeRequest) -> None:
    serve(find_target(request.target), request.settings, request.changes, request.nproc)
