"""Check that a private interface of a library is as the project uses it."""

import importlib
import inspect


def check_interface(name: str, parameters: tuple[str, ...] | None) -> None:
    """Find "module:path", and compare the names of its parameters with `parameters`, unless these are None.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module does not have it.
        AssertionError: the parameters are others.
    """
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if parameters is not None:
        # Ray adds this parameter to the methods of a class that the process has made an actor.
        names = [parameter for parameter in inspect.signature(found).parameters if parameter != "_ray_trace_ctx"]
        assert tuple(names) == parameters
