"""Tokenizers of one token a byte."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.hf.data.files import CHAT, byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHAT)
