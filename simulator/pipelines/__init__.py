"""Pipelines: a rank's stages, its actions in order, and what each framework's loop holds between them."""
