"""Tiny random models and their float64 logits, for the C++ tests: python -m linearize.golden --out ../tests/data/tiny"""
import argparse
import json
import os

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from . import reference
from .config import VARIANTS, ModelConfig

BASE = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=4, head_dim=16, group_size=16, conv_kernel=8, max_position_embeddings=4096)

# name: (shape, number of tokens); 131 and 200 cross several groups and end inside one, as 67 do in groups of 16
MODELS = {
    "paper": (BASE.replace(head_dim=8, tie_word_embeddings=False, **VARIANTS["aug"]), 131),
    "full": (BASE, 131),
    "gqa": (BASE.replace(num_key_value_heads=2, tie_word_embeddings=False), 131),
    "full64": (BASE.replace(group_size=64, conv_kernel=32), 200),
}
MIXED = "full"  # embedding, norms and the like in F32, as checkpoints may be; all else is in bf16


def stored_in_bf16(weights, but=None):
    """The weights as they are stored, and the float32 values that these stand for. but: names that stay in F32."""
    stored = {name: torch.tensor(value, dtype=torch.float32 if but is not None and but(name) else torch.bfloat16)
              for name, value in weights.items()}
    return stored, {name: value.float().numpy() for name, value in stored.items()}


def random_weights(cfg, rng):
    d, f = cfg.hidden_size, cfg.intermediate_size
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim

    def matrix(rows, columns):
        return rng.standard_normal((rows, columns)) / np.sqrt(columns)

    w = {"model.embed_tokens.weight": matrix(cfg.vocab_size, d),
         "model.norm.weight": 1 + 0.1 * rng.standard_normal(d)}
    if not cfg.tie_word_embeddings:
        w["lm_head.weight"] = matrix(cfg.vocab_size, d)
    for i in range(cfg.num_hidden_layers):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = 1 + 0.1 * rng.standard_normal(d)
        w[p + "post_attention_layernorm.weight"] = 1 + 0.1 * rng.standard_normal(d)
        for name, rows, columns in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            w[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, columns)
        for name, rows, columns in (("gate", f, d), ("up", f, d), ("down", d, f)):
            w[f"{p}mlp.{name}_proj.weight"] = matrix(rows, columns)
        w[p + "self_attn.conv_taps"] = 0.3 * rng.standard_normal((cfg.num_attention_heads, cfg.conv_kernel))
        if cfg.global_branch == "scaled":
            w[p + "self_attn.global_factor"] = np.array([0.4])
        if cfg.global_branch == "rms_norm":
            w[p + "self_attn.global_gain"] = rng.uniform(0.3, 1.5, cfg.num_attention_heads)
        if cfg.decay:
            w[p + "self_attn.global_decay"] = np.linspace(0.2, 0.99, cfg.num_key_value_heads)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in w.items()}


# folder: (heads, blocks of each, whether they bring unembeddings of their own, as the published ones do)
MEDUSA = {"full": (3, 2, False), "paper": (2, 1, True)}


def write_medusa(folder, cfg, weights, rng, heads, layers, own):
    """medusa.safetensors, its configuration, and the logits of five hidden states."""
    d, w = cfg.hidden_size, {}
    for n in range(heads):
        for l in range(layers):
            w[f"{n}.{l}.linear.weight"] = rng.standard_normal((d, d)) / np.sqrt(d)
            w[f"{n}.{l}.linear.bias"] = 0.3 * rng.standard_normal(d)
        if own:
            w[f"{n}.{layers}.weight"] = rng.standard_normal((cfg.vocab_size, d)) / np.sqrt(d)
    stored, w = stored_in_bf16(w)
    hidden = rng.standard_normal((5, d)).astype(np.float32)
    unembedding = weights["model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
    logits = reference.medusa_logits(w, heads, layers, hidden, unembedding).astype(np.float32)
    save_torch(stored, os.path.join(folder, "medusa.safetensors"), metadata={"format": "pt"})
    save_file({"hidden": hidden, "logits": logits}, os.path.join(folder, "medusa_golden.safetensors"))
    with open(os.path.join(folder, "medusa_config.json"), "w") as f:
        json.dump({"version": 1, "medusa_num_heads": heads, "medusa_num_layers": layers}, f, indent=2)
        f.write("\n")


def write_recurrent(folder, cfg, weights, rng):
    """recurrent_head.safetensors, its configuration, and the logits of three steps from four hidden states."""
    d, m = cfg.hidden_size, 24
    w = {"state_norm.weight": 1 + 0.2 * rng.standard_normal(d), "token_norm.weight": 1 + 0.2 * rng.standard_normal(d),
         "gate_proj.weight": rng.standard_normal((m, 2 * d)) / np.sqrt(2 * d),
         "up_proj.weight": rng.standard_normal((m, 2 * d)) / np.sqrt(2 * d),
         "down_proj.weight": rng.standard_normal((d, m)) / np.sqrt(m)}
    stored, w = stored_in_bf16(w)
    hidden = rng.standard_normal((4, d)).astype(np.float32)
    tokens = rng.integers(0, cfg.vocab_size, (3, 4)).astype(np.int32)
    unembedding = weights["model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
    logits = reference.recurrent_logits(w, cfg.rms_norm_eps, hidden, tokens, weights["model.embed_tokens.weight"],
                                        unembedding).astype(np.float32)
    save_torch(stored, os.path.join(folder, "recurrent_head.safetensors"), metadata={"format": "pt"})
    save_file({"hidden": hidden, "tokens": tokens, "logits": logits},
              os.path.join(folder, "recurrent_golden.safetensors"))
    with open(os.path.join(folder, "recurrent_head_config.json"), "w") as f:
        json.dump({"version": 1, "intermediate_size": m, "rms_norm_eps": cfg.rms_norm_eps}, f, indent=2)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    for name, (cfg, length) in MODELS.items():
        rng = np.random.default_rng(args.seed)
        folder = os.path.join(args.out, name)
        os.makedirs(folder, exist_ok=True)
        hf = cfg.to_hf(eos_token_id=0)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(hf, f, indent=2)
            f.write("\n")
        stored, weights = stored_in_bf16(random_weights(cfg, rng),
                                         but=(lambda tensor: "_proj" not in tensor) if name == MIXED else None)
        tokens = rng.integers(0, cfg.vocab_size, length).astype(np.int32)
        if cfg.group_size == 16:
            tokens = tokens[:67]  # what is drawn after them stays as it is
        logits = reference.logits(hf, weights, tokens).astype(np.float32)
        save_torch(stored, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        save_file({"tokens": tokens, "logits": logits}, os.path.join(folder, "golden.safetensors"))
        if name in MEDUSA:
            write_medusa(folder, cfg, weights, rng, *MEDUSA[name])
        if name == "full":
            write_recurrent(folder, cfg, weights, rng)
        print(f"{name}: {len(tokens)} tokens, logits within +-{np.abs(logits).max():.2f}, deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
