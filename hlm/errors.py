"""The one error that HLM raises for bad input."""


class HlmError(ValueError):
    """Bad input from the user: the message says what was expected, what was found and what to do."""
