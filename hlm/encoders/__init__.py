"""What an encoder is: loading, saving, fingerprints, pruning, the layout of its folder."""
