"""Pruned models on disk: written whole, read without running anything, known to transformers."""
