"""Layouts that are searched and recommended."""
