"""Grids of trainings, their results and figures."""
