"""What goes to the Hub: which files, with which card, as one commit."""
