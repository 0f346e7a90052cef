"""Tests of configs and workdirs."""
