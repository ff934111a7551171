"""`python -m megatron_sov`: runs `megatron-sov`."""

import sys

from megatron_sov.cli import main

sys.exit(main())
