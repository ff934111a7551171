"""The store between generation, reward and training: prompts, rollouts, their rewards, and who works on
what.  No torch here."""
