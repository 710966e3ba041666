"""Objectives: arrays to loss terms. They know no model."""
