"""Dense decoders with rotary positions, RMSNorm (mostly) and a gated MLP."""
