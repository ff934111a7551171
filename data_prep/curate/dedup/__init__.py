"""Steps that drop or cut what stands in a corpus more than once."""
