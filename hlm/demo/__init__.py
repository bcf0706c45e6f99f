"""What the demo compares and how its page shows it."""
