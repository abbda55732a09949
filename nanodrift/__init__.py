"""nanodrift: a compact LLM serving engine that runs prefill and decode at once on one GPU."""
