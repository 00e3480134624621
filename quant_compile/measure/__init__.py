"""What schemes do to a model, measured and estimated: comparison on a text, and which scheme for which purpose."""
