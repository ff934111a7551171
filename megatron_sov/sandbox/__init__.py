"""Where programs of a model run: processes that can neither reach out nor take more than they are given."""

from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, machine_enclosure, shared_sandbox

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "machine_enclosure", "shared_sandbox"]
