"""Methods that other packages bring, through the entry point group `sparsetrain.methods`.

A package's pyproject.toml names the module (or the config class) whose import registers its methods:

    [project.entry-points."sparsetrain.methods"]
    my_method = "my_package.my_method"
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import entry_points

GROUP = "sparsetrain.methods"


@cache
def load_outside_methods() -> tuple[str, ...]:
    """Load every entry point of the group, once a process; returns the names of those that loaded.

    One that fails is logged with its error and left out: a broken package must not take ours down.
    """
    loaded = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            logging.getLogger("sparsetrain").warning(
                "the methods of entry point %s (%s) cannot be loaded, so they are not known here: %s: %s",
                entry.name,
                entry.value,
                type(error).__name__,
                error,
            )
        else:
            loaded.append(entry.name)
    return tuple(loaded)
