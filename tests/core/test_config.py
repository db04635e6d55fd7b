import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain import FloodFillAttention, MethodConfig, PQAttention, RoutedFFN, TokenSelection
from sparsetrain.core.config import registered_methods

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("config", [RoutedFFN(), RoutedFFN.paper(), PQAttention(), PQAttention.paper(layers=(0, 2))])
def test_json_round_trip(config: MethodConfig) -> None:
    assert MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_and_method_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'num_blocks'"):
        MethodConfig.from_dict({"method": "routed_ffn", "num_block": 8})
    with pytest.raises(ValueError, match="Did you mean 'routed_ffn'"):
        MethodConfig.from_dict({"method": "routed_fnn"})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RoutedFFN, {"num_blocks": 4, "num_active": 5}, "outside 1..num_blocks"),
        (RoutedFFN, {"num_active": 0}, "outside 1..num_blocks"),
        (RoutedFFN, {"shared_ratio": 1.0}, "shared_ratio"),
        (RoutedFFN, {"gate": "softmax"}, "gate"),
        (RoutedFFN, {"compensation": "mean"}, "clustered"),
        (RoutedFFN, {"targets": ()}, "targets is empty"),
        (PQAttention, {"keep_ratio": 0.0}, "keep_ratio"),
        (PQAttention, {"keep_ratio": 1.5}, "keep_ratio"),
        (PQAttention, {"num_keys": 8}, "forced keys"),
        (PQAttention, {"selection": "bucket4"}, "single keys"),
        (PQAttention, {"granularity": "tokens"}, "Did you mean 'token'"),
        (PQAttention, {"granularity": "token", "selection": "bucket4", "score": "match_count", "num_keys": 66}, "% 4"),
    ],
)
def test_values_out_of_range(kind: type[MethodConfig], values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_ffn_split_takes_up_the_remainder_or_says_what_divides() -> None:
    assert RoutedFFN(num_blocks=16, num_active=4, shared_ratio=0.25).split(1536) == (384, 72)
    assert RoutedFFN(num_blocks=5, num_active=2, shared_ratio=0.25).split(1536) == (386, 230)
    with pytest.raises(ValueError, match="Choose num_blocks from"):
        RoutedFFN(num_blocks=5, num_active=2).split(1536)


def test_kept_keys() -> None:
    assert [PQAttention().kept_keys(n) for n in (10, 64, 512, 513, 2048, 2050)] == [10, 64, 64, 128, 256, 320]
    assert PQAttention(num_keys=100).kept_keys(50) == 50


def test_targets_and_layers() -> None:
    config = RoutedFFN(targets=("model.layers.1*",), layers=(1, 11))
    assert [config.takes(f"model.layers.{i}.mlp", i, 12) for i in (0, 1, 10, 11)] == [False, True, False, True]
    assert RoutedFFN(targets=["model.layers.3"]).takes("model.layers.3.mlp", 3, 12)
    assert [RoutedFFN(from_depth=0.5).takes("x", i, 5) for i in range(5)] == [False, False, True, True, True]


def test_every_method_has_a_dense_limit_and_an_example() -> None:
    for config in registered_methods().values():
        assert config.dense_limit() != config.example()


@pytest.mark.parametrize("method", registered_methods())
def test_the_ops_a_config_names_are_those_its_modules_import(method: str) -> None:
    source = Path(inspect.getfile(registered_methods()[method])).with_name("module.py").read_text()
    modules = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    used = {name.split(".")[2] for name in modules if name.startswith("sparsetrain.ops.")}
    assert tuple(sorted(used)) == registered_methods()[method].ops


def test_what_a_config_knows_needs_no_torch() -> None:
    code = (
        "import sys, sparsetrain.methods; from sparsetrain.core.config import registered_methods as r\n"
        "from sparsetrain.planner.quality import risk_of\n"
        "for kind in r().values():\n"
        "    c = kind.example(); c.shortest_trace(), c.begins_dense, c.sparse_at_once(), c.ops, c.own_dropout\n"
        "    risk_of([c.to_dict()])\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_traces_are_long_enough_for_what_a_method_keeps() -> None:
    assert (
        PQAttention(keep_ratio=0.125).shortest_trace() == FloodFillAttention(keep_ratio=0.125).shortest_trace() == 512
    )
    assert TokenSelection(keep_ratio=0.25).shortest_trace() == 512
    assert RoutedFFN().shortest_trace() == 0
    assert max(kind.dense_limit().shortest_trace() for kind in registered_methods().values()) <= 128


def test_a_dense_phase_can_be_left_out() -> None:
    late = FloodFillAttention()
    assert late.begins_dense and not late.sparse_at_once().begins_dense
    assert late.sparse_at_once() == FloodFillAttention(max_dense_steps=0)
    for config in (FloodFillAttention(max_dense_steps=7), FloodFillAttention.dense_limit(), RoutedFFN(), PQAttention()):
        assert config.sparse_at_once() is config
    assert not RoutedFFN().begins_dense


@pytest.mark.parametrize("method", registered_methods())
def test_evidence_is_about_keys_the_method_has(method: str) -> None:
    kind = registered_methods()[method]
    for record in json.loads(Path(inspect.getfile(kind)).with_name("evidence.json").read_text(encoding="utf-8")):
        told = {"deployed"} if "deployed" in record else {"ratio"}
        assert set(record) - {"exact", "with"} == {"setting", "text", "from"} | told
        assert set(record["setting"]) <= set(kind().to_dict())
        file, words = record["from"].split(", ", 1)
        assert words in (ROOT / file).read_text(encoding="utf-8"), record["from"]
