"""Low-rank adapters: their layers, putting them into a model, files, the frozen base in four bits, many at once."""
