"""Retrieval-augmented generation whose benefit is measured: search from scratch, a trained retriever, a reader."""
