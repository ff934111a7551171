"""Steps that drop duplicate documents and cut repeated paragraphs."""
