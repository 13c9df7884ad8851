"""Questions people ask: estimate, validate; figures and the command line."""
