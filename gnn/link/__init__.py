"""Which pairs of nodes are linked?"""
