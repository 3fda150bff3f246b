"""Keep the location of a study or a run up to date with the folder in which this process works."""

import dataclasses
import uuid
from collections.abc import Iterable
from pathlib import Path

from raytune_emotion.errors import Breakdown
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Location

#: Name of the file with the driver of a study or a run at a URI, where locks do not work: the driver that began last.
DRIVER = "driver"


@dataclasses.dataclass(frozen=True)
class RemoteCopy:
    """The location of a study or a run. If it is the folder itself, nothing is copied."""

    folder: Path
    location: Location
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return str(self.location)

    def claim(self, names: Iterable[str]) -> None:
        """Become the driver, and push those of these files that there are, in their order.

        The others are deleted at the location: they are of a study that was never whole. The folder must exist.
        """
        if self.location.is_here(self.folder):
            return
        write_text(self.folder / DRIVER, self.token)
        here = {name: (self.folder / name).exists() for name in names}
        self.location.push(self.folder, [DRIVER])
        self.location.delete([name for name in here if not here[name]])
        self.location.push(self.folder, [name for name in here if here[name]])

    def failure(self) -> str:
        """Say why this process is no longer the driver; "" while it is."""
        if self.location.is_here(self.folder):
            return ""
        driver = self.location.read(DRIVER)
        if driver is None:
            return "its files no longer exist"
        return "" if driver == self.token.encode() else "another process has continued it"

    def push(self, *names: str) -> None:
        """Push files; without names, only check that this process is still the driver.

        Raises:
            Breakdown: another driver has claimed the location; or all requests to it failed.
        """
        # A driver that was taken for dead must not overwrite files of its successor.
        if why := self.failure():
            raise Breakdown(f"{self}: {why}")
        self.location.push(self.folder, names)

    def pull(self, names: Iterable[str]) -> None:
        self.location.pull(self.folder, list(names))

    def delete(self, names: Iterable[str]) -> None:
        if names := list(names):
            self.location.delete(names)

    def mark(self, name: str) -> str | None:
        """Return a file of the folder, which every machine sees that can see the folder; None for a URI."""
        return str(self.folder.absolute() / name) if self.location.is_here(self.folder) else None

    def has(self, name: str) -> bool:
        return self.location.sizes([name]) != [None]

    def of_trial(self, trial_id: str) -> str:
        """Return the address of a trial's folder."""
        return (self.location / "trials" / trial_id).address
