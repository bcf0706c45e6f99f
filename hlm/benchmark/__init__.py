"""Latency, throughput and cold starts of query encoders, side by side."""
