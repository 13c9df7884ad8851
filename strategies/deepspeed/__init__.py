"""DeepSpeed's ZeRO stages, as DeepSpeed 0.19.8 runs them."""
