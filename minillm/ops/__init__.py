"""Operations with three faces: the definition in torch (`*_ref`), native kernels, and a registered torch operator.

Reading order: native (what is compiled, and all checks), int8, nf4; lean (backward passes by hand) needs none of them.
"""
