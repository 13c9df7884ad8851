"""Encoders: every token sees all others."""
