"""How much memory and disk a model takes, before anything is loaded: counted from its config alone.

    plan(config, Use(quantize="nf4", context=2048)) -> Plan          bytes of each part, and of all at the worst moment

Reading order: use (what is asked), weights, activations, moments (what is there at the same time), table.

Tensors are counted. A GPU adds its driver's context (about 0.5 GB), an allocator what it holds in reserve: on the
CPU, glibc's heap up to a fifth of a training step (MALLOC_MMAP_THRESHOLD_=65536 makes it give that back).

A published figure is often more than the weights. Falcon's launch post has "about 90 GB" for Falcon-40B in bf16, 45 GB
in int8 and 27 GB in 4 bits, where the weights are 82.6, 41.9 and 24.0 GB, and about 15 GB for Falcon-7B, where they are
13.8 GB. The difference, 7 to 13 % of the weights, is overhead: cache, activations, driver. Here cache and activations
are counted for the context asked, and nothing is added for the rest.

Not counted either: what int8 and NF4 kernels need while they run, and autocast's copies of the weights.
"""

from minillm.plan.moments import Plan, plan
from minillm.plan.use import Use, parse_size

__all__ = ["Plan", "Use", "parse_size", "plan"]
