"""Detection and masking for personal data."""
