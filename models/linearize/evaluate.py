"""Perplexity, bits per byte, loss by position, and the copy probe."""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def losses(model, stream, length, max_tokens, device="cpu", batch_tokens=4096):
    """Loss of every token of consecutive windows, as [windows, length]."""
    windows = min(max_tokens, len(stream) - 1) // length
    step = max(1, batch_tokens // length)
    rows = []
    for first in range(0, windows, step):
        count = min(step, windows - first)
        x = np.stack([stream[(first + i) * length:(first + i + 1) * length + 1] for i in range(count)])
        x = torch.from_numpy(x.astype(np.int64)).to(device)
        logits = model(x[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        rows.append(loss.view(count, length).cpu())
    return torch.cat(rows)


def summary(model, stream_path, stream, length, max_tokens, device="cpu"):
    with open(stream_path + ".json") as f:
        counts = json.load(f)
    loss = losses(model, stream, length, max_tokens, device)
    mean = loss.mean().item()
    by_position = {}
    for low, high in zip(EDGES, EDGES[1:]):
        if low < length:
            by_position[f"{low}-{min(high, length)}"] = round(loss[:, low:high].mean().item(), 4)
    return {
        "length": length,
        "tokens": loss.numel(),
        "loss": round(mean, 4),
        "perplexity": round(math.exp(mean), 3),
        # Bits per byte of text: the tokens of the whole file stand for all its bytes.
        "bits_per_byte": round(mean / math.log(2) * counts["tokens"] / counts["bytes"], 4),
        "by_position": by_position,
    }


@torch.no_grad()
def copy_probe(model, stream, distance, device="cpu", trials=16, span=32, seed=0):
    """How much a passage seen `distance` tokens ago helps when it comes again.

    Returns the mean loss of the passage's last 24 tokens the second time, less that of the same tokens after the
    same filler when the passage had not been shown. Negative means that the model recalls.
    """
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(trials):
        passage, other = (stream[s:s + span].astype(np.int64) for s in rng.integers(0, len(stream) - span, 2))
        start = rng.integers(0, len(stream) - distance)
        filler = stream[start:start + max(0, distance - span)].astype(np.int64)
        pair = np.stack([np.concatenate([first, filler, passage]) for first in (passage, other)])
        x = torch.from_numpy(pair).to(device)
        logits = model(x)[:, -25:-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, -24:].flatten(), reduction="none").view(2, -1).mean(1)
        total += (loss[0] - loss[1]).item()
    return total / trials


@torch.no_grad()
def generate(model, tokens, count, temperature=0.0, top_p=0.95, seed=0, ends=()):
    """Plain continuation by running the whole sequence each time: for samples in documents, not for serving."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1].float().cpu()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p = p * ((p.cumsum(0) - p) < top_p)
            chosen = int(order[torch.multinomial(p, 1, generator=generator)])
        if chosen in ends:
            break
        tokens.append(chosen)
    return tokens


@torch.no_grad()
def draft_agreement(target, draft, stream, length, windows, device="cpu"):
    """Share of positions where the draft's first choice is the target's."""
    windows = min(windows, len(stream) // length)
    x = np.stack([stream[i * length:(i + 1) * length] for i in range(windows)]).astype(np.int64)
    x = torch.from_numpy(x).to(device)
    return (target(x).argmax(-1) == draft(x).argmax(-1)).float().mean().item()
