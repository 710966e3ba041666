"""Evaluators and metrics of trained systems.

An evaluator is built from a config and called as
`evaluator(system, variables) -> (metrics, figures)`: names to numbers, and
names to pictures u8[H, W, 3].
"""
