"""One request's life, from the door to the last row."""
