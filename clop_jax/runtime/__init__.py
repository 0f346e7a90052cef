"""Devices, processes and file systems."""
