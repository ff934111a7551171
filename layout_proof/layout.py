"""Parallel sizes (`Layout`), and the error `CannotPlay`."""

import math
from dataclasses import asdict, dataclass

TOLERANCE = 1e-9
"""Largest difference, relative to a tensor's largest number. Another order in `sum` changes float64 results
by 1e-15; a wrong layout, by more than 1e-6."""
MAX_RANKS = 16_384
EQUAL, DIFFERS, STANDS, FAILS = "equal", "differs", "stands still", "fails"

class CannotPlay(Exception):
    """Names the file, option or field that prevents a simulation, the rule and the fix."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, with the names of Megatron-Core."""

    ranks: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 0  # tensor parallel size of experts; 0: `tp`, as in Megatron-Core
    sp: bool = False
    distributed_optimizer: bool = False

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    @property
    def replica_ranks(self) -> int:
        """Smallest `ranks` with complete copies of weights and experts."""
        return self.pp * math.lcm(self.tp * self.cp, self.expert_tp * self.ep)

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.ranks // (self.tp * self.pp * self.cp)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per replica: more than the first stage's warm-up, to alternate passes."""
        if self.pp == 1:
            return 2
        return 2 * self.pp if self.vpp > 1 else self.pp + 1

    def check(self) -> None:
        """Raise `CannotPlay` for sizes that do not divide `ranks`."""
        for name, size in reversed(asdict(self).items()):  # `ranks` last: its default follows from the others
            if not isinstance(size, bool) and size < (name != "etp"):
                raise CannotPlay(f"--{name} {size}: must be at least {int(name != 'etp')}")
        if self.ranks > MAX_RANKS:
            raise CannotPlay(f"--ranks {self.ranks}: must be at most {MAX_RANKS}")
        for sizes, product in (("--tp x --pp x --cp", self.tp * self.pp * self.cp),
                               ("--etp x --ep x --pp", self.expert_tp * self.ep * self.pp)):
            if self.ranks % product:
                raise CannotPlay(f"--ranks {self.ranks}: must be a multiple of {sizes} = {product}, "
                                 f"for example --ranks {self.replica_ranks}")
        if self.vpp > 1 and self.pp == 1:
            raise CannotPlay(f"--vpp {self.vpp}: needs --pp of at least 2")
        if self.sp and self.tp == 1:
            raise CannotPlay("--sp: needs --tp of at least 2; leave --sp out")
