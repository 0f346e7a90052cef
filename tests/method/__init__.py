"""Tests of losses, prototypes, collapse measures and theory."""
