"""What is trained: the bi-encoder and its loss, the cross-encoder that ranks again."""
