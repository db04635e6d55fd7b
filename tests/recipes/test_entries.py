"""Methods as recipes write them."""

import subprocess
import sys


def test_a_recipe_is_read_by_a_process_that_has_imported_nothing_else() -> None:
    """The registry is filled by an import: a command that reads a recipe before anything else knew no method."""
    code = "from sparsetrain.recipes.entries import read_methods; print(read_methods(['pst'])[0].method)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "pst\n", found.stderr
