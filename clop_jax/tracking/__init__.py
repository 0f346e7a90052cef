"""Logs, pictures, probes and traces of a running training."""
