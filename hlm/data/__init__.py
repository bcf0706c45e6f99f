"""What comes in: the data contract, its tables, words and spelling, and the sample catalogue."""
