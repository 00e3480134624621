"""What a report shows, as data, and its HTML page. Knows nothing of torch, models or graphs."""
