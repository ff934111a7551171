"""How the arguments of a training command become a checked stage."""
