"""Whether a document is worth keeping: language and form, rules of good text, what must not stay in it."""
