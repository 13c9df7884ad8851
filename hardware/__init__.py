"""Facts and device behaviour: GPUs, links, dtypes, units, the registry."""
