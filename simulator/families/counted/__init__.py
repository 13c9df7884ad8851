"""Families whose parameters are counted from their configurations and whose graph is not built."""
