"""Which class does a node have? On the whole graph at once, or in minibatches."""
