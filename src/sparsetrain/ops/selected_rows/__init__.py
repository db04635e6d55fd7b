"""Gradients through selected rows only: the forward's values are those of all rows, the backward is compact.

Every function here takes the selected rows as a compact tensor [b, k, ...] and returns one. Where all rows were
computed already, the caller hands over the selected rows of that result as `known`, and nothing is computed twice.

Equals: the same function of `keep(x) = where(selected, x, x.detach())`, of which only selected rows are looked at; keys
and values of the other rows are constants (arXiv 2501.18824).

Legend: b samples, t tokens, k selected tokens, h heads, g key/value heads, s keys, d head width.
"""

from sparsetrain.ops.selected_rows.all_rows import attention_of_all as attention_of_all
from sparsetrain.ops.selected_rows.attention import selected_attention as selected_attention
from sparsetrain.ops.selected_rows.keys import KeyValues as KeyValues
from sparsetrain.ops.selected_rows.linear import adapted_as_peft as adapted_as_peft
from sparsetrain.ops.selected_rows.linear import adapted_linear as adapted_linear
from sparsetrain.ops.selected_rows.linear import adapted_product as adapted_product
from sparsetrain.ops.selected_rows.linear import selected_dropout as selected_dropout
from sparsetrain.ops.selected_rows.linear import selected_linear as selected_linear
from sparsetrain.ops.selected_rows.queries import attention_of_queries as attention_of_queries
from sparsetrain.ops.selected_rows.reference import keep as keep
from sparsetrain.ops.selected_rows.reference import selected_attention_reference as selected_attention_reference
from sparsetrain.ops.selected_rows.rows import Rows as Rows
from sparsetrain.ops.selected_rows.rows import replace_rows as replace_rows
from sparsetrain.ops.selected_rows.rows import take_rows as take_rows
