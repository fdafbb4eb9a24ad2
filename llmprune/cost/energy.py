"""An estimate of the energy of a decoded token, alone in its batch: of its multiplications, additions and bytes of weights.

Energies an operation are those of 45 nm at 0.9 V, of DRAM those of reading 64 bits, in the middle of the range that is given
(Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014). A device of today needs less of each; how
two models compare depends little on that, since the bytes are most of it. Left out: attention over the context, its keys and
values, caches, instructions, idle power. bfloat16 is taken for float16, of which alone there are numbers.
"""

from __future__ import annotations

from llmprune.cost import macs
from llmprune.cost.base import Sized

NAME, TITLE = "microjoules_a_token", "energy of a decoded token, µJ (an estimate, by Horowitz, ISSCC 2014)"
_MULTIPLY_ADD = {4: 3.7 + 0.9, 2: 1.1 + 0.4}  # picojoules, by the dtype's bytes
_BYTE = (1300 + 2600) / 2 / 8  # picojoules of reading one from DRAM


def measure(whole: Sized) -> int | None:
    width = whole.model.dtype.itemsize
    if width not in _MULTIPLY_ADD:
        return None
    return round(macs.measure(whole) * (_MULTIPLY_ADD[width] + width * _BYTE) / 1e6)
