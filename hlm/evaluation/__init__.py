"""Retrieval metrics, what a student keeps of its teacher, and the report."""
