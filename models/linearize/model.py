"""LLaMA with softmax or augmented linear attention, in the form used for training.

All groups of a sequence are computed in parallel. Parameter names are those of the exported file, except
`decay_logit`, whose sigmoid is exported as `global_decay`.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rope_tables(length, head_dim, theta, device):
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def unit(x, eps):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        h, hkv, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, h * d, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, hkv * d, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, hkv * d, bias=False)
        self.o_proj = nn.Linear(h * d, cfg.hidden_size, bias=False)
        if cfg.attention == "softmax":
            return
        if cfg.conv_kernel:
            taps = torch.randn(h, cfg.conv_kernel) * 0.05
            taps[:, 0] += 0.5
            self.conv_taps = nn.Parameter(taps)
        if cfg.global_branch == "scaled":
            self.global_factor = nn.Parameter(torch.zeros(1))
        if cfg.global_branch == "rms_norm":
            # Small but not zero: at zero neither q, k nor the decay would receive a gradient from this branch.
            self.global_gain = nn.Parameter(torch.full((h,), 0.25))
        if cfg.decay:
            spread = torch.linspace(0.2, 0.99, hkv) if hkv > 1 else torch.tensor([0.9])
            self.decay_logit = nn.Parameter(torch.logit(spread))

    def forward(self, x, rope):
        cfg = self.cfg
        b, t, _ = x.shape
        h, hkv, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        q = apply_rope(self.q_proj(x).view(b, t, h, d).transpose(1, 2), *rope)
        k = apply_rope(self.k_proj(x).view(b, t, hkv, d).transpose(1, 2), *rope)
        v = self.v_proj(x).view(b, t, hkv, d).transpose(1, 2)
        if cfg.attention == "softmax":
            y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=h != hkv)
        else:
            y = self.linear_attention(unit(q, cfg.qk_norm_eps), unit(k, cfg.qk_norm_eps), v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, h * d))

    def linear_attention(self, q, k, v):
        cfg = self.cfg
        g = cfg.group_size
        b, h, t, d = q.shape
        repeat = h // k.shape[1]
        pad = -t % g
        if pad:  # padding lies after every real token, so causality hides it
            q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        n = (t + pad) // g
        q, k, v = (x.reshape(b, x.shape[1], n, g, d) for x in (q, k, v))
        y = 0
        if cfg.global_branch != "none":
            y = self.grouped(q, k, v, repeat)
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        weight = 0
        if cfg.local == "relu_squared":
            causal = torch.ones(g, g, dtype=torch.bool, device=q.device).tril()
            weight = F.relu(q @ k.transpose(-1, -2)).square() * causal
        if cfg.conv_kernel:
            # Taps that stay inside the group join the local weights, so one product with v serves both.
            lag = torch.arange(g, device=q.device)
            lag = lag[:, None] - lag[None, :]
            inside = (lag >= 0) & (lag < cfg.conv_kernel)
            weight = weight + (self.conv_taps[:, lag.clamp(0, cfg.conv_kernel - 1)] * inside)[:, None]
        if isinstance(weight, torch.Tensor):
            y = y + weight.to(v.dtype) @ v
        if cfg.conv_kernel > 1:
            y = y + self.conv_from_previous_group(v)
        y = y + torch.zeros_like(q) if not isinstance(y, torch.Tensor) else y
        return y.reshape(b, h, n * g, d)[:, :, :t].to(v.dtype)

    def conv_from_previous_group(self, v):
        """What the first K-1 positions of each group read from the last K-1 of the group before."""
        g, reach = self.cfg.group_size, self.cfg.conv_kernel - 1
        row = torch.arange(reach, device=v.device)[:, None]
        col = torch.arange(reach, device=v.device)[None, :]
        lag = row + reach - col
        inside = lag <= reach
        weight = (self.conv_taps[:, lag.clamp(max=reach)] * inside)[:, None].to(v.dtype)
        tail = F.pad(v[:, :, :-1, g - reach:], (0, 0, 0, 0, 1, 0))
        return F.pad(weight @ tail, (0, 0, 0, g - reach))

    def grouped(self, q, k, v, repeat):
        cfg = self.cfg
        n = q.shape[2]
        fold = (k.transpose(-1, -2).to(v.dtype) @ v).float()
        # S before group i is the sum over j < i of decay^(i-1-j) fold_j.
        power = torch.arange(n, device=q.device)
        power = power[:, None] - 1 - power[None, :]
        if cfg.decay:
            scan = torch.exp(power.clamp(min=0) * F.logsigmoid(self.decay_logit.float())[:, None, None])
        else:
            scan = torch.ones(1, n, n, device=q.device)
        scan = scan * (power >= 0)
        state = (scan @ fold.flatten(3)).view_as(fold)
        if repeat > 1:
            state = state.repeat_interleave(repeat, dim=1)
        y = (q.to(v.dtype) @ state.to(v.dtype)).float()
        if cfg.global_branch == "scaled":
            return self.global_factor * y
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + cfg.global_norm_eps)
        return self.global_gain[:, None, None, None] * y


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope):
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class LanguageModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Body(cfg)
        # As buffers: a compiled graph would otherwise compute sines and cosines again for every head, row and layer.
        cos, sin = rope_tables(4096, cfg.head_dim, cfg.rope_theta, None)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() != 2 or name.endswith("conv_taps"):
                continue
            # Branches start silent, so that the first steps see a plain bigram model.
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(weight.shape[1])
            nn.init.zeros_(weight) if silent else nn.init.normal_(weight, std=std)

    def rope(self, length, device):
        if length > len(self.rope_cos):
            return rope_tables(length, self.cfg.head_dim, self.cfg.rope_theta, device)
        return self.rope_cos[:length], self.rope_sin[:length]

    def hidden(self, tokens):
        x = self.model.embed_tokens(tokens)
        rope = self.rope(tokens.shape[1], tokens.device)
        for layer in self.model.layers:
            x = layer(x, rope)
        return self.model.norm(x)

    def unembed(self, hidden):
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def forward(self, tokens):
        return self.unembed(self.hidden(tokens))

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())
