"""The notation of blends: what is written for a receipt reads back as the same parts."""

from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.serving.adapters.split import parse_blend


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_a_written_weight_reads_back(weights: list[float]) -> None:
    """Large ones too, whose usual form has the "+" that joins parts."""
    given_parts = parse_blend("+".join(f"sql*{weight!r}".replace("e+", "e") for weight in weights))
    written = "+".join(f"{part.reference}{part.factor}" for part in given_parts)
    assert [part.weight for part in parse_blend(written)] == weights
