"""Tests of documentation, scripts and packaging."""
