"""The shape of a model, and its config.json as docs/model_format.md defines it."""
import dataclasses
import json
from dataclasses import dataclass


@dataclass
class ModelConfig:
    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 65536
    attention: str = "linear"  # or "softmax": the teacher, which the server does not load
    group_size: int = 64
    conv_kernel: int = 32
    local: str = "relu_squared"
    global_branch: str = "rms_norm"
    decay: bool = True
    qk_norm_eps: float = 1e-6
    global_norm_eps: float = 1e-6

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to_hf(self, eos_token_id):
        fields = dataclasses.asdict(self)
        out = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float32",
        }
        shape = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                 "num_key_value_heads head_dim rms_norm_eps rope_theta tie_word_embeddings "
                 "max_position_embeddings").split()
        out.update({name: fields[name] for name in shape})
        out["linear_attention"] = {
            "version": 1,
            "group_size": self.group_size,
            "conv_kernel": self.conv_kernel,
            "local": self.local,
            "global": self.global_branch,
            "decay": self.decay,
            "qk_norm_eps": self.qk_norm_eps,
            "global_norm_eps": self.global_norm_eps,
        }
        return out

    @classmethod
    def from_hf(cls, config):
        block = dict(config["linear_attention"])
        block["global_branch"] = block.pop("global")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in (config | block).items() if name in names})

    def save(self, path):
        with open(path, "w") as f:
            json.dump(dataclasses.asdict(self), f, indent=2)

    @classmethod
    def load(cls, path):
        with open(path) as f:
            return cls(**json.load(f))


# The forms compared in docs/quality.md, as changes to a base shape.
VARIANTS = {
    "softmax": dict(attention="softmax"),
    "local": dict(conv_kernel=0, global_branch="none", decay=False),
    "local-grouped": dict(conv_kernel=0, global_branch="scaled", decay=False),
    "local-conv": dict(global_branch="none", decay=False),
    "aug": dict(global_branch="scaled", decay=False),
    "full": dict(global_branch="rms_norm", decay=True),
}
