"""Pages and files for people who want to look at a dependency graph or a report."""
