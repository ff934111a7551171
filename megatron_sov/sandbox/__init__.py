"""Run model-written programs, and read untrusted files, in processes with limits and without network."""
