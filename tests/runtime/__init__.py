"""Tests of devices, processes and file systems."""
