"""Tests of what a training logs."""
