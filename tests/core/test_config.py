import json

import pytest

from sparsetrain import MethodConfig, PQAttention, RoutedFFN
from sparsetrain.core.config import registered_methods


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
