"""The model of docs/model_format.md in float64, one token at a time, straight from the definitions.

Shares no code with the training form, so that each checks the other. Every sum runs over all earlier positions.
"""
import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def rope(x, position, theta):
    """x is [heads, head_dim]; channel i turns with channel i + head_dim / 2."""
    d = x.shape[1]
    out = np.empty_like(x)
    for i in range(d // 2):
        angle = position * theta ** (-2.0 * i / d)
        c, s = np.cos(angle), np.sin(angle)
        out[:, i] = x[:, i] * c - x[:, i + d // 2] * s
        out[:, i + d // 2] = x[:, i + d // 2] * c + x[:, i] * s
    return out


def medusa_logits(w, heads, layers, hidden, unembedding):
    """[heads, rows, V] for hidden [rows, D]; a head without an unembedding of its own uses the target's."""
    out = []
    for n in range(heads):
        x = np.array(hidden, dtype=np.float64)
        for l in range(layers):
            z = x @ w[f"{n}.{l}.linear.weight"].astype(np.float64).T + w[f"{n}.{l}.linear.bias"]
            x = x + z / (1 + np.exp(-z))
        out.append(x @ w.get(f"{n}.{layers}.weight", unembedding).astype(np.float64).T)
    return np.stack(out)


def recurrent_logits(w, eps, hidden, tokens, embedding, unembedding):
    """[steps, rows, V] after each of the tokens [steps, rows], from hidden [rows, D]."""
    norm = lambda x, weight: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    w = {name: value.astype(np.float64) for name, value in w.items()}
    out, state = [], np.array(hidden, dtype=np.float64)
    for step in tokens:
        embedded = embedding[step].astype(np.float64)
        u = np.concatenate((norm(state, w["state_norm.weight"]), norm(embedded, w["token_norm.weight"])), axis=-1)
        gate, up = u @ w["gate_proj.weight"].T, u @ w["up_proj.weight"].T
        state = state + (gate / (1 + np.exp(-gate)) * up) @ w["down_proj.weight"].T
        out.append(state @ unembedding.astype(np.float64).T)
    return np.stack(out)


class LayerHistory:
    def __init__(self):
        self.k, self.v = [], []


def attend(cfg, w, prefix, x, t, history):
    block = cfg["linear_attention"]
    heads, kv_heads, d = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    q = (w[prefix + "q_proj.weight"] @ x).reshape(heads, d)
    k = (w[prefix + "k_proj.weight"] @ x).reshape(kv_heads, d)
    v = (w[prefix + "v_proj.weight"] @ x).reshape(kv_heads, d)
    q, k = rope(q, t, cfg["rope_theta"]), rope(k, t, cfg["rope_theta"])
    q = q / np.sqrt(np.sum(q * q, axis=1, keepdims=True) + block["qk_norm_eps"])
    k = k / np.sqrt(np.sum(k * k, axis=1, keepdims=True) + block["qk_norm_eps"])
    history.k.append(k)
    history.v.append(v)
    y = np.zeros((heads, d))
    group = t // block["group_size"]
    for h in range(heads):
        kv = h // (heads // kv_heads)
        grouped = np.zeros(d)
        decay = float(w[prefix + "global_decay"][kv]) if block["decay"] else 1.0
        for j in range(t + 1):
            group_j = j // block["group_size"]
            score = q[h] @ history.k[j][kv]
            if group_j == group and block["local"] == "relu_squared":
                y[h] += max(score, 0.0) ** 2 * history.v[j][kv]
            if group_j < group:
                grouped += decay ** (group - 1 - group_j) * score * history.v[j][kv]
            if t - j < block["conv_kernel"]:
                y[h] += w[prefix + "conv_taps"][h, t - j] * history.v[j][kv]
        if block["global"] == "scaled":
            y[h] += w[prefix + "global_factor"][0] * grouped
        if block["global"] == "rms_norm":
            scale = np.sqrt(np.mean(grouped * grouped) + block["global_norm_eps"])
            y[h] += w[prefix + "global_gain"][h] * grouped / scale
    return w[prefix + "o_proj.weight"] @ y.reshape(-1)


def logits(cfg, weights, tokens):
    """float64 logits after every token; `cfg` is the parsed config.json, `weights` the tensors by name."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    histories = [LayerHistory() for _ in range(cfg["num_hidden_layers"])]
    head = w["model.embed_tokens.weight"] if cfg["tie_word_embeddings"] else w["lm_head.weight"]
    out = []
    for t, token in enumerate(tokens):
        x = w["model.embed_tokens.weight"][token]
        for i, history in enumerate(histories):
            p = f"model.layers.{i}."
            normed = rms_norm(x, w[p + "input_layernorm.weight"], cfg["rms_norm_eps"])
            x = x + attend(cfg, w, p + "self_attn.", normed, t, history)
            normed = rms_norm(x, w[p + "post_attention_layernorm.weight"], cfg["rms_norm_eps"])
            gate = w[p + "mlp.gate_proj.weight"] @ normed
            up = w[p + "mlp.up_proj.weight"] @ normed
            x = x + w[p + "mlp.down_proj.weight"] @ (gate / (1.0 + np.exp(-gate)) * up)
        out.append(head @ rms_norm(x, w["model.norm.weight"], cfg["rms_norm_eps"]))
    return np.stack(out)
