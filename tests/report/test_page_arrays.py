"""Arrays survive the way to the page; the page's own reading of them is tested in a browser."""

from base64 import b64decode

import numpy as np
import pytest

from evomerge.report.page.arrays import pack, pack_bits, pack_columns


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([0, 255], "u1"),
        ([-1, 7], "i2"),
        ([0, 256], "i2"),
        ([-40_000, 7], "i4"),
        (np.array([0.1, np.nan]), "f8"),
        (np.array([0.1, np.inf], dtype=np.float32), "f4"),
        ([], "f8"),
    ],
)
def test_numbers_keep_their_values_in_the_fewest_bytes(numbers: object, kind: str) -> None:
    packed = pack(numbers)  # type: ignore[arg-type]
    assert packed["kind"] == kind
    np.testing.assert_array_equal(np.frombuffer(b64decode(packed["data"]), dtype=f"<{kind}"), np.asarray(numbers))


def test_bits_come_first_bit_first() -> None:
    packed = pack_bits(np.array([True, False, True, False, False, False, False, False, True]))
    assert packed == {"kind": "bits", "size": 9, "data": "oIA="}


def test_columns_are_kept_to_a_65535th_of_their_range() -> None:
    numbers_ND = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 100.0, 0.0] + [0.0, 5.0, 0.3]
    packed = pack_columns(numbers_ND)
    steps_DN = np.frombuffer(b64decode(packed["data"]), dtype="<u2").reshape(3, 50)
    read_ND = np.array(packed["low"]) + steps_DN.T / 65535 * np.array(packed["span"])
    assert (np.abs(read_ND - numbers_ND) <= np.ptp(numbers_ND, axis=0) / 65535 / 2 + 1e-12).all()
