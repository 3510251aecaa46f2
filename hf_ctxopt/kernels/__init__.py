"""Tensor functions on pages. Pure: they know shapes, not caches or models."""
