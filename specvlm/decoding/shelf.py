"""Keep the most recently used items within a budget of bytes: on their devices first, then in host memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from specvlm.models.kept import Kept


@dataclass(eq=False)
class Item:
    """An item on a shelf: tensors that are kept for later requests.

    Attributes:
        kept: The tensors.
        parent: Item that this one depends on. Dropping the parent drops this one too.
        more: Bytes on the device besides `kept`.
        users: Number of running requests that read the item now. While there are any, it may not move.
        children: Number of items whose parent this item is.
        used: When it was last used, as a count of the uses of all items so far.
    """

    kept: Kept
    parent: Item | None = None
    more: int = 0
    users: int = 0
    children: int = 0
    used: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the item on its device, or in host memory if it is there."""
        return self.kept.nbytes + self.more

    def forget(self) -> None:
        """Free the tensors of a dropped item, even if a request that has read it still holds the item."""
        if not self.users:
            self.kept = Kept(())


@dataclass
class Shelf:
    """Holds items within a budget, and drops the least recently used.

    Attributes:
        device_bytes: Most bytes on devices.
        host_bytes: Most bytes in host memory, to which items move when there is no room on the devices.
        damaged: Number of copies in host memory that were dropped because they had changed.
        items: All items, on devices or in host memory.
    """

    device_bytes: int
    host_bytes: int = 0
    damaged: int = 0
    items: set[Item] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._clock = count(1)

    def nbytes(self, on_host: bool = False) -> int:
        """Bytes of all items on devices; with `on_host`, of all items in host memory."""
        return sum(item.nbytes for item in self.items if item.kept.on_host is on_host)

    def put(self, item: Item) -> None:
        """Add an item. Call `make_room` first."""
        self.items.add(item)
        if item.parent is not None:
            item.parent.children += 1
        self.touch(item)

    def touch(self, item: Item | None) -> None:
        """Mark an item, and those that it depends on, as just used."""
        now = next(self._clock)
        while item is not None:
            item.used, item = now, item.parent

    def load(self, item: Item) -> bool:
        """Bring an item back to its device. Returns whether it is there now.

        Without room on the device, the item stays in host memory. If its copy there has changed, it is dropped.
        """
        if item not in self.items:
            return False
        if not item.kept.on_host:
            return True
        if not self.make_room(item.nbytes, item) or item not in self.items:
            return False
        if item.kept.load():
            return True
        self.damaged += 1
        self.drop(item)
        return False

    def make_room(self, size: int, keep: Item | None = None) -> bool:
        """Move or drop the least recently used items until there is room on the devices. Returns whether there is.

        keep: An item that may not be moved.
        """
        if size > self.device_bytes:
            return False
        if keep is not None:
            keep.users += 1
        try:
            while self.nbytes() + size > self.device_bytes:
                movable = [item for item in self.items if not item.kept.on_host and not item.users]
                item = min(movable, key=lambda item: (item.used, item.children), default=None)
                if item is None or not (self._move(item) or self._drop_leaf(on_host=False)):
                    return False
            return True
        finally:
            if keep is not None:
                keep.users -= 1

    def _move(self, item: Item) -> bool:
        """Move an item to host memory, dropping others from there to make room. Returns whether it was moved."""
        if item.nbytes > self.host_bytes:
            return False
        while self.nbytes(on_host=True) + item.nbytes > self.host_bytes:
            if not self._drop_leaf(on_host=True):
                return False
        item.kept.offload()
        return True

    def _drop_leaf(self, on_host: bool) -> bool:
        """Drop the least recently used item on which no other depends. Returns whether there was one."""
        leaves = [item for item in self.items if item.kept.on_host is on_host and not item.users and not item.children]
        item = min(leaves, key=lambda item: item.used, default=None)
        if item is not None:
            self.drop(item)
        return item is not None

    def drop(self, item: Item) -> None:
        """Drop an item and all that depend on it."""
        if item not in self.items:
            return
        for other in [other for other in self.items if other.parent is item]:
            self.drop(other)
        self.items.discard(item)
        item.forget()
        if item.parent is not None:
            item.parent.children -= 1

    def empty(self) -> None:
        """Drop all items."""
        for item in self.items:
            item.forget()
        self.items.clear()
