"""Models to prune."""
