"""Layers that are not all attention: state space models, linear recurrences, and mixes of them."""
