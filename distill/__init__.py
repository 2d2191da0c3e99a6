"""Offline knowledge distillation of language models: run the teacher once, keep what it said, train from that."""

__version__ = "0.1.0"
