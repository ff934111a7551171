"""Steps that judge single documents: encoding, language and form, quality rules, personal data."""
