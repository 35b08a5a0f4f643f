"""Variational autoencoders from scratch."""
