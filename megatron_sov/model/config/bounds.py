"""Upper bounds for settings that determine compute time or memory.

The bounds lie far above any known model or run, so a value with extra zeros is rejected before work starts.
"""

from typing import Annotated

from annotated_types import Ge, Le

MAX_STEPS = 100_000_000
MAX_TOKENS = 10**16
MAX_BATCH_SIZE = 1_000_000
MAX_SEQ_LEN = 1_000_000_000
MAX_LAYERS = 10_000

Steps = Annotated[int, Ge(0), Le(MAX_STEPS)]
Tokens = Annotated[int, Ge(0), Le(MAX_TOKENS)]
Samples = Annotated[int, Ge(0), Le(MAX_BATCH_SIZE)]
SeqLen = Annotated[int, Ge(2), Le(MAX_SEQ_LEN)]
