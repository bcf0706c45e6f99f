"""Repositories on the Hub as folders."""
