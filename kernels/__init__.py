"""Public operators: arrays in, arrays out."""
