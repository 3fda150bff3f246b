"""What goes wrong for a reason the user can mend."""

from collections.abc import Iterable


class UserError(ValueError):
    """Input that is wrong: every fault of it at once, one sentence each.

    The commands print the sentences on standard error and exit with code 2.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        if not self.faults:
            raise AssertionError("a UserError without a fault")
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type["UserError"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class Breakdown(RuntimeError):
    """What ended the work though its input is right, such as a full disk; what was done is kept, and can be resumed.

    The commands print it as a sentence on standard error and exit with code 1.
    """
