"""Backbones (`resnet`) and the heads on top of them (`heads`)."""
