"""Self-contained HTML pages with tables and charts, and safe text for Markdown."""
