"""HostPages: a second, larger home in host memory for prefixes that the device has no room for any more.

A page evicted on the device moves here; a prefix hit moves it back. Knows slots and names only: the moves are lists
that the engine carries out at the beginning of the next step, offloads before restores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Move = tuple[int, int]


class HostPages:
    """Slots of host memory by the name of the page they hold, coldest given up first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # name -> (slot, the tenant's root)
        self._free = list(range(num_slots - 1, -1, -1))
        self._leaving: list[int] = []  # still read by the next step's restores
        self._offloads: dict[int, int] = {}  # slot -> page: a slot that is given up again is written once
        self._arriving: list[bytes] = []  # written by the next step's offloads
        self._arrived: list[bytes] = []  # written by the last step's
        self._restores: list[Move] = []
        self.offloaded_pages = 0
        self.restored_pages = 0

    @property
    def num_used(self) -> int:
        """Pages held."""
        return len(self._slots)

    def count(self, digests: Sequence[bytes]) -> int:
        """How many pages of the chain `digests` are here, from its beginning without a gap."""
        for number, digest in enumerate(digests):
            if digest not in self._slots:
                return number
        return len(digests)

    def offload(self, page: int, digest: bytes, root: bytes) -> None:
        """A device page is about to be overwritten: keep its content, in place of the coldest if there is no room."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return
        if self._free:
            slot = self._free.pop()
        elif self._slots:
            slot = self._slots.popitem(last=False)[1][0]
        else:
            return  # every slot is on its way out
        self._slots[digest] = slot, root
        self._offloads[slot] = page
        self._arriving.append(digest)
        self.offloaded_pages += 1

    def take(self, digests: Sequence[bytes]) -> list[int]:
        """Slots of pages that move back to the device; they are no longer found here."""
        slots = [self._slots.pop(digest)[0] for digest in digests]
        self._leaving += slots
        return slots

    def restore(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Say which device pages the taken slots go to."""
        self._restores += zip(slots, pages, strict=True)
        self.restored_pages += len(slots)

    def forget(self, root: bytes | None) -> int:
        """Drop the pages of one tenant's root, or all; how many."""
        doomed = [name for name, (_, own) in self._slots.items() if root is None or own == root]
        # A slot that the next step still writes to is given up with that step, like one that is read.
        self._leaving += [self._slots.pop(name)[0] for name in doomed]
        return len(doomed)

    def take_moves(self) -> tuple[list[Move], list[Move]]:
        """(page, slot) to offload, then (slot, page) to restore, in the step that begins now."""
        moves = [(page, slot) for slot, page in self._offloads.items()], self._restores
        self._offloads, self._restores = {}, []
        self._arrived, self._arriving = self._arriving, []
        self._free += self._leaving
        self._leaving = []
        return moves

    def distrust_last_moves(self) -> None:
        """The step that was to carry out the last moves failed: drop what it may not have written."""
        for name in self._arrived:
            if name in self._slots:
                self._free.append(self._slots.pop(name)[0])
        self._arrived = []

    def check(self) -> None:
        """Raise RuntimeError if a slot is lost or has two uses."""
        slots = [slot for slot, _ in self._slots.values()] + self._free + self._leaving
        if sorted(slots) != list(range(self.num_slots)):
            raise RuntimeError(f"{len(slots)} host slots are accounted for, there are {self.num_slots}")
