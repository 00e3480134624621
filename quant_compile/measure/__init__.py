"""What quantization costs a model, measured by simulation: weight by weight (``attribute``), and what to choose (``search``)."""
