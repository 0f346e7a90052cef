"""Guides, examples and benchmarks; not part of the package."""
