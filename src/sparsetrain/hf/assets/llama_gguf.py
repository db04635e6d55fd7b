"""A GGUF file of the Llama architecture -> a folder that `from_pretrained` loads: safetensors, config, tokenizer.

GGUF stores block-quantised weights. transformers can read them, but calls the result quantised and then refuses to
save it; and for 135 M parameters on one core it took 40 s with the tokenizer, against 13 s here (half of that is the
`gguf` reader going through 98,000 token strings). Two things need care:

- Rotary layout. GGUF interleaves the two halves of each head in the rows of Q and K; transformers keeps the halves
  apart. With h heads of width d the stored row order (h, d/2, 2) becomes (h, 2, d/2).
- Pre-tokenizer. The "smollm" scheme splits digits one by one before the byte-level split. transformers' own GGUF
  tokenizer leaves that out, so "x =  12" gets other tokens than the model was trained on.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama_gguf(gguf_file: Path, folder: Path) -> None:
    """Write `model.safetensors` (fp32), `config.json` and the tokenizer of `gguf_file` into `folder`.

    Raises:
        RuntimeError: the `gguf` package is not installed.
        ValueError: the file is of another architecture or tokenizer than Llama with byte-level BPE.

    Cost: the fp32 weights in memory once (0.54 GB for 135 M parameters).
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RuntimeError(
            f"Converting {gguf_file.name} needs the 'gguf' package. Install it with `pip install gguf`."
        ) from error
    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = (fields.get("general.architecture"), fields.get("tokenizer.ggml.model"))
    if found != ("llama", "gpt2"):
        raise ValueError(
            f"{gguf_file} holds architecture and tokenizer {found}; only ('llama', 'gpt2') can be converted. "
            "Load other GGUF files with transformers' gguf_file argument."
        )
    tokenizer = _tokenizer(fields)
    config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _save_weights(reader, config, folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_weights(reader: Any, config: Any, folder: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    rotary_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.split(".")[-2]
        if part in rotary_heads:
            weight = unpermute_rotary(weight, rotary_heads[part])
        state[_parameter_name(tensor.name)] = weight
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, unreadable in a shared cache


def unpermute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows from GGUF's order (head, half-width, 2) to transformers' (head, 2, half-width); weight is (h*d, in)."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def _parameter_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
    top, _, suffix = name.partition(".")
    if top in _TOP:
        return f"{_TOP[top]}.{suffix}"
    raise ValueError(f"Tensor {name!r} has no place in transformers' Llama. Convert another file.")


def _config(fields: dict[str, Any], tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        # Stored as fp32; 6 digits bring back the decimal it was written as (1e-05, not 9.999999747e-06).
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(
            f"The pre-tokenizer {fields['tokenizer.ggml.pre']!r} is not known here, only 'smollm'. "
            "Load this file with transformers' gguf_file argument."
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    types = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, type_ in zip(tokens, types) if type_ == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
