"""The table of planted faults: name -> what is planted, and what `minillm verify` must say of it."""

from tests.parity.verify_faults.attention import ATTENDED
from tests.parity.verify_faults.planted import Bench, Planted
from tests.parity.verify_faults.positions import PLACED
from tests.parity.verify_faults.stream import STREAM
from tests.parity.verify_faults.theirs import THEIRS
from tests.parity.verify_faults.weights import LOADED

FAULTS: dict[str, Planted] = {**LOADED, **PLACED, **ATTENDED, **STREAM, **THEIRS}

__all__ = ["FAULTS", "Bench", "Planted"]
