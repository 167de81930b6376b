"""How theta is learnt: one file per algorithm."""
