"""Proposers: what suggests how sequences go on, for the target model to verify."""
