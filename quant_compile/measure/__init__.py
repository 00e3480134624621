"""What schemes do to a model: comparison on a text, each weight's share, schemes under a budget, and which scheme for which purpose."""
