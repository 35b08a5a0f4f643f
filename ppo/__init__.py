"""Proximal policy optimisation from scratch: right under today's gymnasium, resumable to the bit, fast on a CPU."""
