"""What does a system learn from? Batches, TinyWorld, tokenizers, mixtures."""
