"""Where programs of a model run: processes that can neither reach out nor take more than they are given."""
