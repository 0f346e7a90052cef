"""Linear probe, kNN and fine-tuning of trained networks."""
