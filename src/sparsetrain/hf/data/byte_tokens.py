"""A tokenizer whose tokens are bytes: nothing to download, nothing unknown, 258 ids."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids: 0 padding, 1 end of text, then the 256 bytes in the order of byte-level BPE's alphabet."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *sorted(ByteLevel.alphabet())])}
    made = Tokenizer(BPE(vocabulary, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = ByteDecoder()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
