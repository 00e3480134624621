"""Sums over ranks, together with what follows them."""
