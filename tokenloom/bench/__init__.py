"""Measurements that use an engine: throughput, simulated load, capacity. And load on a server."""
