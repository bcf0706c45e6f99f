"""HLM: turn a billion-parameter retriever into a query encoder small enough to serve online."""

__version__ = "0.1.0"
