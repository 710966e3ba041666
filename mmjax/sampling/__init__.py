"""Decoding engines. They know no model: a step function and its state."""
