"""`python -m megatron_sov` is `megatron-sov`."""

import sys

from megatron_sov.cli import main

sys.exit(main())
