"""Tests of probe, kNN and fine-tuning."""
