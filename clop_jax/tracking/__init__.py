"""What a training logs about itself."""
