"""Arrays as the page reads them: base64 of little-endian numbers, in no more bytes than they need.

``static/data.js`` reads what is written here.
"""

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.records import Floats

Packed = dict[str, Any]
INTEGERS = ("u1", "i2", "i4")
LEVELS = 65535


def pack(numbers: npt.NDArray[Any] | Sequence[float]) -> Packed:
    """Return float64 and float32 arrays as they are, and integers in the fewest bytes that hold them; any shape."""
    array = np.asarray(numbers)
    kind = array.dtype.str[1:]
    if array.dtype.kind in "iub":
        array = array.astype(np.int64)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        kind = next(name for name in INTEGERS if np.iinfo(name).min <= low and high <= np.iinfo(name).max)
    return {"kind": kind, "data": _encoded(array.astype(f"<{kind}"))}


def pack_bits(flags: npt.NDArray[np.bool_]) -> Packed:
    """Return flags as one bit each, the first in the highest place of its byte."""
    return {"kind": "bits", "size": int(flags.size), "data": _encoded(np.packbits(flags))}


def pack_columns(numbers_ND: Floats) -> Packed:
    """Return a matrix column by column in steps of 1/65535 of each column's range: to be shown, not to be exported."""
    low_D = numbers_ND.min(axis=0, initial=np.inf)
    span_D = numbers_ND.max(axis=0, initial=-np.inf) - low_D
    steps_ND = np.round((numbers_ND - low_D) / np.where(span_D > 0, span_D, 1.0) * LEVELS)
    data = _encoded(steps_ND.T.astype("<u2"))
    return {"kind": "columns", "low": low_D.tolist(), "span": span_D.tolist(), "data": data}


def _encoded(array: npt.NDArray[Any]) -> str:
    return b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
