"""The three phases: trainer, batches, losses, gradient caching, hard negatives, checkpoints."""
