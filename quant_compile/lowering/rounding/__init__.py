"""How codes and scales of a weight are chosen: to nearest, by a search over scales, or by what calibration made; below the store."""
