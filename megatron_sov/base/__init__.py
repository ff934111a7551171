"""Shared foundations: errors, artifacts and hashes, settings, plug-ins, documents, pages."""
