"""The scorer stage: NumPy only, self-contained, copied as it is into every model repository."""
