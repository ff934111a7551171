"""What jobs on a Slurm cluster are made of, as data: cluster profiles, templates, chains, ready scripts.
README.md says how.

The code that reads it is `megatron_sov.operate.slurm`.
"""
