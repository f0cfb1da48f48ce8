"""Faults, with real processes throughout."""
