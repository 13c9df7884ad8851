"""Families of 2019 to 2023: learned or ALiBi positions, plain MLPs, LayerNorm, parallel blocks."""
