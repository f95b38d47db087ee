"""Processes and devices: ranks, their launcher, signals, collectives, sharding."""
