"""Who has which places of one long line of memory: regions of their own length, taken, given back, moved together.

Counts places alone and knows of no tensors. A place holds the keys and values of one token.
"""

from bisect import insort
from dataclasses import dataclass

SMALLEST = 512
GRAIN = 64


@dataclass(eq=False)
class Region:
    """The places from `begin` on, `size` of them; 0 once it was given back. `need` of them are asked for.

    Up to `clean` places from the beginning are known to hold numbers.
    """

    begin: int
    size: int
    need: int
    clean: int = 0

    @property
    def end(self) -> int:
        """The first place behind it."""
        return self.begin + self.size


def comfortable(need: int) -> int:
    """A power of two, at least `SMALLEST`: neighbours of equal size lie evenly, and share calls."""
    return max(SMALLEST, 1 << (need - 1).bit_length())


def exact(need: int) -> int:
    """`need`, rounded up to `GRAIN`."""
    return -(-need // GRAIN) * GRAIN


class Regions:
    """The regions of a line of `places`."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._taken: list[Region] = []

    @property
    def free(self) -> int:
        """Places that nobody has, wherever they lie."""
        return self.places - sum(region.size for region in self._taken)

    def take(self, size: int, need: int) -> Region | None:
        """The first gap of `size` places; None where there is none."""
        begin = 0
        for region in self._taken:
            if region.begin - begin >= size:
                break
            begin = region.end
        if self.places - begin < size:
            return None
        made = Region(begin, size, need)
        insort(self._taken, made, key=lambda region: region.begin)
        return made

    def give_back(self, region: Region) -> None:
        """Its places are free."""
        if region.size:
            self._taken.remove(region)
            region.size = region.clean = 0

    def close_up(self) -> list[tuple[int, int, int]]:
        """Take from each region what it does not need, and move all to the front.

        Returns (from, to, places) of what has to be copied, in an order in which nothing is overwritten that is still needed.
        """
        moves, at = [], 0
        for region in self._taken:
            region.size = min(region.size, exact(region.need))
            region.clean = min(region.clean, region.size)
            if region.begin != at and region.clean:
                moves.append((region.begin, at, region.clean))
            region.begin = at
            at = region.end
        return moves
