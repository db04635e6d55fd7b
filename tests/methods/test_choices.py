"""Choices that a config repeats, so that it need not import the operation they are of."""

from sparsetrain.methods.flood_fill_attention import config as flood_fill
from sparsetrain.methods.semi_structured import config as semi_structured
from sparsetrain.ops import attention_patterns, sparse24_linear


def test_a_configs_choices_are_its_operations() -> None:
    assert flood_fill.VARIANTS == attention_patterns.VARIANTS and set(flood_fill.CONVOLVED) < set(flood_fill.VARIANTS)
    assert semi_structured.WGRADS == sparse24_linear.WGRADS
