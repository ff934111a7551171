"""Safety: requests of a taxonomy's categories with refusals that redirect or safe completions, and harmless
twins that have to be answered."""
