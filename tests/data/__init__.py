"""Tests of sources, augmentation and loaders."""
