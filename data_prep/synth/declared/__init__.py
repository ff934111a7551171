"""Generators that are YAML files: how a file is read, and how its steps run."""
