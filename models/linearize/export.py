"""Hugging Face layout as docs/model_format.md defines it, with 8-bit weights."""
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from . import tokenizer as tok
from .config import ModelConfig
from .model import LanguageModel


def quantize_rows(weight):
    """int8 and one scale per row. Of a few clipping points the one with the least squared error is kept."""
    weight = weight.float()
    peak = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    best = None
    for clip in (1.0, 0.97, 0.94, 0.91, 0.88):
        scale = peak * clip / 127
        q = (weight / scale).round().clamp(-127, 127)
        error = (q * scale - weight).square().sum(dim=1, keepdim=True)
        if best is None:
            best = [q, scale, error]
            continue
        better = error < best[2]
        best = [torch.where(better, new, old) for new, old in zip((q, scale, error), best)]
    return best[0].to(torch.int8), best[1][:, 0].contiguous()


def exported_tensors(model, int8):
    """Tensors by their published names."""
    out = {}
    for name, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if name.endswith("decay_logit"):
            out[name.replace("decay_logit", "global_decay")] = torch.sigmoid(value)
        elif int8 and value.dim() == 2 and not name.endswith("conv_taps"):
            out[name], out[name + "_scale"] = quantize_rows(value)
        else:
            out[name] = value.contiguous()
    return out


def rounded_copy_(model):
    """Gives every 8-bit weight of `model` the value a server will see, for evaluation."""
    state = model.state_dict()
    for name, value in state.items():
        if value.dim() == 2 and not name.endswith("conv_taps"):
            q, scale = quantize_rows(value)
            value.copy_(q.float() * scale[:, None])
    return model


def write(model, tokenizer_path, folder, int8=True):
    if model.cfg.attention != "linear":
        raise ValueError("the format holds linear attention only; the softmax teacher stays a checkpoint")
    os.makedirs(folder, exist_ok=True)
    ends = [tok.END_OF_TEXT, tok.END_OF_TURN]

    def dump(name, value):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(value, f, indent=2)
            f.write("\n")

    dump("config.json", model.cfg.to_hf(ends))
    dump("generation_config.json", {
        "bos_token_id": tok.END_OF_TEXT, "eos_token_id": ends, "do_sample": True,
        "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256})
    tok.save_config(folder, model.cfg.max_position_embeddings)
    shutil.copyfile(tokenizer_path, os.path.join(folder, "tokenizer.json"))
    path = os.path.join(folder, "model.safetensors")
    save_file(exported_tensors(model, int8), path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    return os.path.getsize(path)


def read_tensors(path):
    """Tensors by name, 8-bit ones as the values that they stand for."""
    stored = load_file(path)
    return {name: value.float() * stored[name + "_scale"][:, None] if value.dtype == torch.int8 else value
            for name, value in stored.items() if not name.endswith("_scale")}


def read(folder):
    """The model of an exported folder, with the weights that a server sees."""
    with open(os.path.join(folder, "config.json")) as f:
        model = LanguageModel(ModelConfig.from_hf(json.load(f)))
    state = {}
    for name, value in read_tensors(os.path.join(folder, "model.safetensors")).items():
        if name.endswith("global_decay"):
            name, value = name.replace("global_decay", "decay_logit"), torch.logit(value.double()).float()
        state[name] = value
    model.load_state_dict(state)
    return model
