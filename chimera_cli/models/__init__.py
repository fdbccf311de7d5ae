"""Towers, the dual encoder that joins them, and their weights on disk."""
