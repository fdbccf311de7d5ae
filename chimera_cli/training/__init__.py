"""Losses, features of locked towers, optimiser, schedule and the loop."""
