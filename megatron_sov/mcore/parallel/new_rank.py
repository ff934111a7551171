"""The program of a rank that is a new process: does what stands in the plan of its launcher.

`launcher` calls it, with the descriptor of the plan's file.
"""

from __future__ import annotations

import sys

from megatron_sov.mcore.parallel import launcher
from megatron_sov.mcore.parallel.rank_plan import read_plan

if __name__ == "__main__":
    launcher.be_rank(lambda: read_plan(int(sys.argv[1])))
