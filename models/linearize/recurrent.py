"""The recurrent draft head (in the manner of ReDrafter, arXiv 2403.09919): guesses one token after the other, each
from the target's final hidden state and the tokens drafted since.

    s_0 = h,   u = [RMSNorm(s_{i-1}); RMSNorm(E[x_i])],   s_i = s_{i-1} + W_down (SiLU(W_gate u) * (W_up u))

E is the target's embedding, x_i the i-th token after the one that gave h; the target's unembedding turns s_i into the
distribution of x_{i+1}. One head serves every depth, so it is small, and unlike Medusa's heads it sees the path.
"""
import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .export import quantize_rows, read_tensors
from .model import RMSNorm


class RecurrentHead(nn.Module):
    def __init__(self, cfg, intermediate_size):
        super().__init__()
        self.cfg = cfg
        dim = cfg.hidden_size
        self.state_norm = RMSNorm(dim, cfg.rms_norm_eps)
        self.token_norm = RMSNorm(dim, cfg.rms_norm_eps)
        self.gate_proj = nn.Linear(2 * dim, intermediate_size, bias=False)
        self.up_proj = nn.Linear(2 * dim, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, dim, bias=False)
        nn.init.zeros_(self.down_proj.weight)  # a new head says what the target said a token before

    def forward(self, state, embedded):
        u = torch.cat((self.state_norm(state), self.token_norm(embedded)), dim=-1)
        return state + self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


def load(cfg, folder):
    """The head of an exported folder, or of a training folder with the weights of its latest checkpoint."""
    exported = os.path.join(folder, "recurrent_head.safetensors")
    if os.path.exists(exported):
        saved = read_tensors(exported)
    else:
        saved = torch.load(os.path.join(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)["model"]
    head = RecurrentHead(cfg, saved["down_proj.weight"].shape[1])
    head.load_state_dict(saved)
    return head


def write(head, folder, int8=True):
    """recurrent_head.safetensors beside the target's files (docs/model_format.md); returns its size."""
    tensors = {}
    for name, value in head.state_dict().items():
        value = value.detach().float().cpu()
        if int8 and value.dim() == 2:
            tensors[name], tensors[name + "_scale"] = quantize_rows(value)
        else:
            tensors[name] = value.contiguous()
    path = os.path.join(folder, "recurrent_head.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    config = {"version": 1, "intermediate_size": head.down_proj.in_features, "rms_norm_eps": head.cfg.rms_norm_eps}
    with open(os.path.join(folder, "recurrent_head_config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")
    return os.path.getsize(path)


def unrolled(head, target, hidden, tokens, levels):
    """Yields, for depth n = 1 .. levels, the states [rows, length - n, D] at the places whose n next tokens are known.

    Place t, level n has seen tokens[t + 1 .. t + n]; it guesses the token n + 1 ahead.
    """
    embedded = target.model.embed_tokens(tokens)
    state = hidden
    for n in range(1, levels + 1):
        state = head(state[:, :tokens.shape[1] - n], embedded[:, n:])
        yield n, state


@torch.no_grad()
def agreement(target, head, stream, length, windows, levels=5, device="cpu"):
    """By depth: how often the head's first choice is the target's, and the mean overlap sum min(p, q) of their
    distributions (how often a draft from q would be accepted), given that the path so far is the text's."""
    starts = torch.arange(min(windows, len(stream) // length)) * length
    rows = torch.stack([torch.as_tensor(stream[s:s + length].astype("int64")) for s in starts.tolist()]).to(device)
    equal, overlap, parts = torch.zeros(levels), torch.zeros(levels), rows.split(8)
    for row in parts:
        hidden = target.hidden(row)
        logits = target.unembed(hidden).float()
        for n, state in unrolled(head, target, hidden, row, levels):
            want, got = logits[:, n:], target.unembed(state).float()
            equal[n - 1] += (want.argmax(-1) == got.argmax(-1)).float().mean().cpu() / len(parts)
            overlap[n - 1] += torch.minimum(want.softmax(-1), got.softmax(-1)).sum(-1).mean().cpu() / len(parts)
    return {"first choice": [round(v, 4) for v in equal.tolist()], "overlap": [round(v, 4) for v in overlap.tolist()]}
