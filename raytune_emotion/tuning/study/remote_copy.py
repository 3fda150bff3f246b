"""Keep a study's location up to date with the folder in which this process works."""

import dataclasses
import uuid
from collections.abc import Iterable
from pathlib import Path

from raytune_emotion.errors import Breakdown
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Location

#: Name of the file with the driver of a study at a URI, where locks do not work: the driver that began last.
DRIVER = "driver"


@dataclasses.dataclass(frozen=True)
class RemoteCopy:
    """A study's location. If it is the folder itself, nothing is copied."""

    folder: Path
    location: Location
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return str(self.location)

    def claim(self, names: Iterable[str]) -> None:
        """Become the driver, and push those of these files that there are, in their order.

        The others are deleted at the location: they are of a study that was never whole.
        """
        if self.location.is_here(self.folder):
            return
        write_text(self.folder / DRIVER, self.token)
        here = {name: (self.folder / name).exists() for name in names}
        self.location.push(self.folder, [DRIVER])
        self.location.delete([name for name in here if not here[name]])
        self.location.push(self.folder, [name for name in here if here[name]])

    def push(self, *names: str) -> None:
        """Push files.

        Raises:
            Breakdown: another driver has claimed the study; or all requests to the location failed.
        """
        if self.location.is_here(self.folder):
            return
        # A driver that was taken for dead must not overwrite files of its successor.
        driver = self.location.read(DRIVER)
        if driver != self.token.encode():
            why = "the study no longer exists" if driver is None else "another search has continued this study"
            raise Breakdown(f"{self}: {why}")
        self.location.push(self.folder, names)

    def pull(self, names: Iterable[str]) -> None:
        self.location.pull(self.folder, list(names))

    def delete(self, names: Iterable[str]) -> None:
        if names := list(names):
            self.location.delete(names)

    def has(self, name: str) -> bool:
        return self.location.sizes([name]) != [None]

    def of_trial(self, trial_id: str) -> str:
        """Return the address of a trial's folder."""
        return (self.location / "trials" / trial_id).address
