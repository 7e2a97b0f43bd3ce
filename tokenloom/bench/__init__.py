"""Measurements that use an engine: throughput, simulated load, capacity."""
