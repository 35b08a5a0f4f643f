"""How good a search or a reader is: scores, the ways that are compared, what is chosen on, pictures."""
