"""The library's ways to be faster or smaller that no setting offers, and why: what is told to who asks."""

from __future__ import annotations

_OVERLAP = ("the library's schedule for it calls routers without the mask of padding, which they would send "
            "to experts and count as load, and computes losses of its own; leave it out: "
            "gpu.shared_expert_overlap = on hides a part of the same messages")
_GRAPHS = ("the library's CUDA graphs refuse packed rows, which all rows are here, and experts take as many "
           "tokens as come; leave it out, and give the GPU more work for each launch by a larger "
           "train.micro_batch_size")
_WEIGHTS = ("checkpoints, exports and the replica checks read weights in bf16; leave it out: with train.fp8 "
            "products take 8 bits all the same")

NOT_OFFERED = {
    "cuda_graphs": _GRAPHS, "cuda_graph_impl": _GRAPHS, "cuda_graph_scope": _GRAPHS,
    "enable_cuda_graph": _GRAPHS, "external_cuda_graph": _GRAPHS,
    "expert_parallel_overlap": _OVERLAP, "overlap_moe_expert_parallel_comm": _OVERLAP,
    "delay_wgrad_compute": _OVERLAP,
    "fp8_weights": _WEIGHTS, "fp8_param": _WEIGHTS, "fp8_param_gather": _WEIGHTS,
    "reuse_grad_buf_for_mxfp8_param_ag": _WEIGHTS,
}
"""Last part of a setting's name -> why it does not exist, and what to do."""
