"""Recipes: what is accepted, what is refused and how it says so, and when two recipes train the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain import PQAttention, RoutedFFN
from sparsetrain.core.config import registered_methods
from sparsetrain.recipes.entries import parse_method, read_methods, written_defaults
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.presets import PRESETS

NEEDED = {"model": "m", "data": "d"}


def make(**values: Any) -> Recipe:
    return Recipe.from_values(NEEDED | values)


def test_without_methods_or_preset_the_run_chooses() -> None:
    for open_ in (make(), make(methods=None), make(preset="auto"), make(preset="auto", methods=[])):
        assert (open_.preset, open_.configs) == ("auto", ())
    for given in (make(methods=[]), make(preset="dense"), make(preset="spt"), make(methods=["routed_ffn"])):
        assert given.preset is None
    assert make(preset="spt").configs == PRESETS["spt"]
    assert make(methods=[]).configs == make(preset="dense").configs == ()


def test_what_is_decided_takes_the_place_of_the_preset(tmp_path: Path) -> None:
    open_ = make(lr=1e-3, epochs=2, lora_targets=["q_proj"])
    made = open_.decided(PRESETS["tokens"], gradient_checkpointing="non-reentrant")
    assert made == make(
        preset="tokens", lr=1e-3, epochs=2, lora_targets=["q_proj"], gradient_checkpointing="non-reentrant"
    )
    assert Recipe.from_values(open_.model_dump(mode="json")) == open_
    open_.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == open_
    assert Recipe.from_yaml(tmp_path / "r.yaml", {"preset": None, "methods": ["routed_ffn"]}).preset is None


def test_the_paper_preset_holds_the_published_choices() -> None:
    assert make(preset="spt-paper").configs == (PQAttention.paper(), RoutedFFN.paper())


def test_methods_add_to_a_preset() -> None:
    made = make(preset="spt-paper", methods=["routed_ffn:num_blocks=8,num_active=2,layers=1|3-4"])
    assert made.configs[-1] == RoutedFFN(num_blocks=8, num_active=2, layers=(1, 3, 4))
    assert len(made.configs) == 3


def test_yaml_reads_back_equal(tmp_path: Path) -> None:
    made = make(preset="spt", steps=7, lora_targets=["q_proj", "v_proj"], lr=1e-4, threads=3)
    made.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == made
    assert Recipe.from_yaml(tmp_path / "r.yaml").fingerprint() == made.fingerprint()


def test_method_values_are_read_as_the_config_holds_them() -> None:
    text = "pq_attention:keep_ratio=1/8,num_keys=none,detach_qk=false,targets=a*|b,layers=0-2,codebook_weight=1e-2"
    config = make(methods=[text]).configs[0]
    assert config == PQAttention(
        keep_ratio=0.125, detach_qk=False, targets=("a*", "b"), layers=(0, 1, 2), codebook_weight=0.01
    )
    assert parse_method("routed_ffn") == {"method": "routed_ffn"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, "unknown key 'lrr'. Did you mean 'lr'"),
        ({"steps": 0}, "steps=0"),
        ({"lr": -1}, "lr=-1"),
        ({"keep_checkpoints": 1}, "keep_checkpoints=1"),
        ({"steps": 3, "epochs": 1}, "both given"),
        ({"steps": 3, "warmup_steps": 3}, "leaves nothing"),
        ({"task": "lmm"}, "'lm', 'sft', 'classify', 'image', 'diffusion' or 'pair-image'"),
        ({"preset": "spt_paper"}, "Did you mean 'spt-paper'"),
        ({"preset": "auto", "methods": ["routed_ffn"]}, "preset=auto chooses the methods, and routed_ffn is given"),
        ({"lora_targets": 3}, "lora_targets=3"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"methods": ["routed_fnn"]}, "Did you mean 'routed_ffn'"),
        ({"methods": ["routed_ffn:num_activ=3"]}, "Did you mean 'num_active'"),
        ({"methods": ["routed_ffn:num_active"]}, "has no '='"),
        ({"methods": ["routed_ffn:num_blocks=8.5"]}, "not of type int"),
        ({"methods": ["routed_ffn:num_active=9"]}, "outside 1..num_blocks"),
        ({"methods": ["pq_attention:keep_ratio=3/2"]}, "keep_ratio=1.5 is out of range"),
        ({"methods": ["pq_attention:detach_qk=maybe"]}, "not of type bool"),
        ({"methods": "routed_ffn"}, "Give a list"),
        ({"methods": [3]}, "methods holds 3"),
    ],
)
def test_mistakes_are_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")) as caught:
        make(**values)
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_key_says_how_to_give_it() -> None:
    with pytest.raises(ValueError, match=r"data is missing.*--data"):
        Recipe.from_values({"model": "m"})


def test_two_mistakes_are_two_lines() -> None:
    with pytest.raises(ValueError) as caught:
        make(lr=-1, batch_size=0)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\xff", "just words"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.yaml"):
        Recipe.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_changes_win_over_the_file_and_replace_paired_keys(tmp_path: Path) -> None:
    make(steps=9, preset="spt", lr=1e-3).to_yaml(tmp_path / "r.yaml")
    made = Recipe.from_yaml(tmp_path / "r.yaml", {"epochs": 2, "preset": "dense", "lr": 1e-2})
    assert (made.steps, made.epochs, made.methods, made.lr) == (None, 2, (), 1e-2)


def test_the_fingerprint_covers_what_changes_the_result_and_nothing_else() -> None:
    made = make(preset="spt")
    for same in (
        {"output": "x"}, {"resume": True}, {"save_every": 3}, {"keep_checkpoints": 5}, {"eval_every": 2},
        {"threads": 1}, {"compare": "dense"}, {"device": "cpu"}, {"gradient_checkpointing": "reentrant"},
    ):  # fmt: skip
        assert make(**{"preset": "spt"} | same).fingerprint() == made.fingerprint(), same
    for other in (
        {"lr": 1e-3}, {"seed": 1}, {"steps": 7}, {"preset": "dense"}, {"seq_len": 64}, {"lora_r": 0},
        {"data": "e"}, {"dtype": "bf16"}, {"calibration_tokens": 1}, {"max_grad_norm": 0},
    ):  # fmt: skip
        assert make(**{"preset": "spt"} | other).fingerprint() != made.fingerprint(), other


def test_differences_name_the_keys() -> None:
    made = make(methods=["routed_ffn:num_blocks=8"], lr=1e-3)
    other = make(methods=["routed_ffn:num_blocks=4"], lr=2e-3)
    assert made.differences(other.training_values()) == [
        "lr: 0.002 there, 0.001 here",
        "methods.0.routed_ffn.num_blocks: 4 there, 8 here",
    ]
    assert make(preset="dense").differences(made.training_values())[-1] == "methods: ['routed_ffn'] there, [] here"
    assert made.differences(made.training_values()) == []


def test_every_key_is_explained() -> None:
    for name, entry in Recipe.model_fields.items():
        assert entry.description and len(entry.description) > 20, name


@pytest.mark.parametrize("method", registered_methods())
def test_the_defaults_that_are_shown_are_read_back(method: str) -> None:
    (config,) = read_methods([written_defaults(registered_methods()[method])])
    assert config == registered_methods()[method]()


def test_what_has_no_kernel_on_a_device_is_said_where_the_device_is_picked() -> None:
    from sparsetrain.hf.train.assemble import say_device

    def said(device: str, **method: Any) -> list[str]:
        asked = Recipe.from_values({"model": "m", "data": "d", "methods": [method]})
        heard: list[str] = []
        say_device(asked, torch.device(device), lambda event: heard.append(event["text"]))
        return heard

    (blocks,) = said("mps", method="pq_attention")
    assert blocks.startswith("device mps: block_sparse_attention as the reference") and "token_sparse" not in blocks
    (tokens,) = said("mps", method="pq_attention", granularity="token")
    assert "token_sparse_attention as the reference" in tokens
    assert not said("mps", method="token_selection")
    assert not said("cpu", method="pq_attention") and not said("cuda", method="pq_attention")
