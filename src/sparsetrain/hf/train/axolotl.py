"""A plugin of axolotl: sparse training by a block of its YAML file.

    plugins:
      - sparsetrain.hf.train.axolotl.SparsityPlugin
    sparsity:
      methods:
        - {method: token_selection, keep_ratio: 0.3}

The model is converted when axolotl has loaded it, before it adds LoRA. Its trainers are transformers', so the method is
driven and saved as by any of these. axolotl imports this module by its name; nothing of ours does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

import sparsetrain.methods  # noqa: F401  (enters them in the registry)
from sparsetrain.core.config import MethodConfig
from sparsetrain.hf.data.text import load_text
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.deploy import Deploy, DeployDense


class Sparsity(BaseModel):
    """The block `sparsity:`.

    Args:
        methods: as in a recipe: `method` and its options, one entry a method.
        deploy: `dense` (the product is a plain adapter or model), `sparse`, or the options of `DeployDense`.
        calibration: text files, or another source of text, for methods that are fitted before training.
        calibration_rows: rows of `sequence_len` tokens that are read of it.
    """

    model_config = ConfigDict(extra="forbid")

    methods: list[dict[str, Any]] = Field(min_length=1)
    deploy: Literal["dense", "sparse"] | dict[str, Any] = "dense"
    calibration: str | list[str] | None = None
    calibration_rows: int = Field(default=8, ge=1)

    def configs(self) -> list[MethodConfig]:
        """Raises ValueError: a method or an option is unknown."""
        return [MethodConfig.from_dict(entry) for entry in self.methods]

    def deployed(self) -> Deploy:
        return DeployDense(**self.deploy) if isinstance(self.deploy, dict) else self.deploy


class SparsityArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    sparsity: Sparsity | None = None


class SparsityPlugin(BasePlugin):
    """Converts the model that axolotl trains.

    Attributes:
        handle: of the model that was converted last.
    """

    handle: Handle | None = None

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Check the block before anything is loaded.

        Raises:
            ValueError: there is none, or it asks for what is not there.
        """
        asked = _asked(cfg)
        asked.configs()
        asked.deployed()

    def get_input_args(self) -> str:
        return f"{__name__}.{SparsityArgs.__name__}"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Convert; called before adapters are added, so that axolotl's LoRA config can be told what to train too."""
        asked = _asked(cfg)
        self.handle = sparsify(
            model,
            *asked.configs(),
            calibration=_calibration(asked, cfg),
            deploy=asked.deployed(),
            seed=cfg["seed"] or 0,
        )
        if added := self.handle.modules_to_save:
            cfg["lora_modules_to_save"] = [*(cfg["lora_modules_to_save"] or []), *added]


def _asked(cfg: Mapping[str, Any]) -> Sparsity:
    found = cfg.get("sparsity")
    if not found:
        raise ValueError(
            "axolotl was given sparsetrain's plugin and no block `sparsity:` with methods. Add one, for example "
            "`sparsity: {methods: [{method: NAME}]}`, or take the plugin out of `plugins`."
        )
    return found if isinstance(found, Sparsity) else Sparsity.model_validate(_plain(found))


def _plain(value: Any) -> Any:
    """axolotl's dictionaries answer for keys that they don't have."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _calibration(asked: Sparsity, cfg: Any) -> list[dict[str, Any]] | None:
    if asked.calibration is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(cfg["tokenizer_config"] or cfg["base_model"])
    tokens = asked.calibration_rows * cfg["sequence_len"]
    rows = load_text(asked.calibration, tokenizer, cfg["sequence_len"], eval_ratio=0.0, max_tokens=tokens)
    batch = rows.collate_fn([rows.train[i] for i in range(len(rows.train))])
    return [{name: value for name, value in batch.items() if name != "labels"}]
