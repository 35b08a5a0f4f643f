"""Which class does a whole graph have?"""
