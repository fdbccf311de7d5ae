"""Chimera trains, proves and gates small vision-language models on one consumer GPU or a CPU."""

__version__ = "0.1.0"
