"""Model families: one small declaration each, and what they are made of."""
