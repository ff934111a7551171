"""Pipeline steps as checks for finished samples."""
