"""Medusa heads (arXiv 2401.10774): head n guesses, from the target's final hidden state, the token n + 2 ahead.

A head is a few residual blocks x + SiLU(W x + b); the target's unembedding turns its output into logits, so a head
is small. Parameter names are the published ones less the unembeddings: `{n}.{l}.linear.{weight,bias}`.
"""
import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .export import quantize_rows, read_tensors


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)  # a new head says what the target says
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.Module):
    def __init__(self, cfg, count, layers=1):
        super().__init__()
        self.cfg, self.layers = cfg, layers
        self.heads = nn.ModuleList(nn.Sequential(*(Block(cfg.hidden_size) for _ in range(layers))) for _ in range(count))

    def forward(self, hidden):
        return [head(hidden) for head in self.heads]


def load(cfg, folder):
    """Heads of an exported folder, or of a training folder with the weights of its latest checkpoint."""
    exported = os.path.join(folder, "medusa.safetensors")
    if os.path.exists(exported):
        saved = {"heads." + name: value for name, value in read_tensors(exported).items()}
    else:
        saved = torch.load(os.path.join(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)["model"]
    names = [name.split(".") for name in saved if name.endswith(".weight")]
    heads = MedusaHeads(cfg, 1 + max(int(n[1]) for n in names), 1 + max(int(n[2]) for n in names))
    heads.load_state_dict(saved)
    return heads


def write(heads, folder, int8=True):
    """medusa.safetensors and medusa_config.json beside the target's files (docs/model_format.md)."""
    tensors = {}
    for name, value in heads.state_dict().items():
        name, value = name.removeprefix("heads."), value.detach().float().cpu()
        if int8 and value.dim() == 2:
            tensors[name], tensors[name + "_scale"] = quantize_rows(value)
        else:
            tensors[name] = value.contiguous()
    return save(tensors, folder, len(heads.heads), heads.layers)


def save(tensors, folder, count, layers):
    path = os.path.join(folder, "medusa.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    with open(os.path.join(folder, "medusa_config.json"), "w") as f:
        json.dump({"version": 1, "medusa_num_heads": count, "medusa_num_layers": layers}, f, indent=2)
        f.write("\n")
    return os.path.getsize(path)


def convert(source, folder, int8=False):
    """Published heads, `medusa_lm_head.pt` and `config.json`, as the server reads them.

    Their last member is an unembedding of their own: `{n}.{layers}.weight`. The pickle is read with weights only, so
    nothing in it can run. Names and shapes are left for the server to check, which knows the target.
    """
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    count, layers = int(config["medusa_num_heads"]), int(config["medusa_num_layers"])
    stored = torch.load(os.path.join(source, "medusa_lm_head.pt"), map_location="cpu", weights_only=True)
    if not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"{source}/medusa_lm_head.pt holds more than named tensors")
    tensors = {}
    for name, value in stored.items():
        if int8 and value.dim() == 2:
            tensors[name], tensors[name + "_scale"] = quantize_rows(value)
        else:
            tensors[name] = value.contiguous()
    return save(tensors, folder, count, layers)


@torch.no_grad()
def agreement(target, heads, stream, length, windows, device="cpu", top=(1, 4)):
    """For each head, how often the target's first choice at its place is among the head's first `top` guesses."""
    starts = torch.arange(min(windows, len(stream) // length)) * length
    rows = torch.stack([torch.as_tensor(stream[s:s + length].astype("int64")) for s in starts.tolist()]).to(device)
    counts = torch.zeros(len(heads.heads), len(top))
    for row in rows.split(8):
        hidden = target.hidden(row)
        choice = target.unembed(hidden).argmax(-1)
        for n, guess in enumerate(heads(hidden)):
            best = target.unembed(guess[:, :-n - 1]).topk(max(top), dim=-1).indices
            hit = best == choice[:, n + 1:, None]
            counts[n] += torch.stack([hit[..., :k].any(-1).float().mean() * len(row) for k in top]).cpu()
    return {k: [round(v, 4) for v in (counts[:, i] / len(rows)).tolist()] for i, k in enumerate(top)}
