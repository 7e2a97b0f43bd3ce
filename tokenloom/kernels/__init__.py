"""Arithmetic: programs of op records, exact oracles of each op, and the backends that run them."""
