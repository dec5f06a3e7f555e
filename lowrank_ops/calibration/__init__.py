"""Moments of the inputs of a model's linear layers, gathered from batches of text."""

from .gather import calibrate

__all__ = ["calibrate"]
