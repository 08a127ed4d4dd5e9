"""Linear layers whose weights are 8 or 4 bits, put in the place of float ones after construction.

Reading order: int8_linear, nf4_linear, convert.
"""
