"""What every task builds on: graphs, sparse products, layers, scores, pictures."""
