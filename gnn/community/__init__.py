"""Which nodes belong together, without labels?"""
