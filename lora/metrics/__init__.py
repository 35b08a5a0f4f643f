"""How good a model is: losses, scores of answers and classes, and how sure one may be of a difference."""
