"""The operations that speed and memory rest on, one implementation a chip."""
