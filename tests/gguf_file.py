"""A GGUF file of a tiny Llama, as llama.cpp would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model: Any, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a Llama with 97 tokens: three special ones, printable characters, `ab` and `cd`."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *map(chr, range(33, 125)), "ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        **{
            f"blk.{n}.{mine}": f"model.layers.{n}.{its}"
            for n in range(config.num_hidden_layers)
            for mine, its in _LAYER.items()
        },
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for mine, its in names.items():
        weight = model.get_parameter(f"{its}.weight").detach().float().numpy()
        if count := heads.get(mine.rpartition(".")[2]):  # llama.cpp turns pairs that lie side by side
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        weight = np.ascontiguousarray(weight)
        if weight.ndim == 1:
            writer.add_tensor(f"{mine}.weight", weight)
        else:
            writer.add_tensor(f"{mine}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
