"""Models that do not fit: activations on disk, weights read when needed, several processes."""
