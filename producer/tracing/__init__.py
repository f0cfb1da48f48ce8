"""Tracing, in the terms of OpenTelemetry."""
