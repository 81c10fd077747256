"""Where clean images come from: one module for each format."""
