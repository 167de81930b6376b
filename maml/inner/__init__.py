"""Adaptation, theta to theta': one file per inner optimizer."""
