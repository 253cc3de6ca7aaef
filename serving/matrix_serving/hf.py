"""A Llama-family GGUF file as the Hugging Face folder that vLLM and SGLang read.

    python serving/matrix_serving/hf.py MODEL.gguf FOLDER

Run it in an environment that has torch, transformers and gguf, such as vLLM's own; it needs nothing of matrix-bus.
Weights are dequantized to float32; llama.cpp's order of the rotary dimensions of queries and keys is undone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor that llama.cpp calls `name`.

    Raises `KeyError` or `ValueError` for one that a plain Llama does not have.
    """
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def without_permutation(weights: Any, heads: int) -> Any:
    """Queries or keys with the two halves of each head's rotary dimensions one after the other, not interleaved."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(source: Path, folder: Path) -> None:
    """Writes `folder`: config, weights, tokenizer; all of it, or nothing.

    Raises `SystemExit` with what is wrong: no such file, none of this family, a package that is missing.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SystemExit(f"{source}: {error.strerror}") from None
    if magic != b"GGUF":
        raise SystemExit(f"{source} is not a GGUF file")
    if folder.exists():
        raise SystemExit(f"{folder} exists already: name another folder, or delete it")
    try:
        import torch  # type: ignore[import-not-found]
        from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit(
            f"the conversion needs torch, transformers and gguf ({error}): run it with the interpreter of vLLM's "
            "environment, after pip install gguf there"
        ) from None

    reader = GGUFReader(str(source))
    family = reader.get_field("general.architecture").contents()
    if family != "llama":
        raise SystemExit(f"{source} is of the family {family!r}: only llama can be converted; serve its original")

    def fact(name: str, default: Any = None) -> Any:
        field = reader.get_field(f"llama.{name}")
        return default if field is None else field.contents()

    heads = int(fact("attention.head_count"))
    kv_heads = int(fact("attention.head_count_kv", heads))
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = without_permutation(values, heads)
        elif ".attn_k." in tensor.name:
            values = without_permutation(values, kv_heads)
        try:
            weights[hf_name(tensor.name)] = torch.tensor(values)
        except (KeyError, ValueError):
            raise SystemExit(f"{source} has a tensor {tensor.name!r}, which this conversion does not know") from None
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=int(fact("embedding_length")),
        intermediate_size=int(fact("feed_forward_length")),
        num_hidden_layers=int(fact("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(fact("context_length")),
        rms_norm_eps=float(fact("attention.layer_norm_rms_epsilon")),
        rope_theta=float(fact("rope.freq_base", 10_000.0)),
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        torch_dtype="float32",
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{source} does not fit: missing {missing}, unexpected {unexpected}")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
