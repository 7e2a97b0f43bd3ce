"""Proposers of token trees, and the sampling that verifies them by rejection."""
