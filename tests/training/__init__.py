"""Tests of the train step."""
