"""The training form (groups in parallel) must equal the sequential definition."""
import numpy as np
import pytest
import torch

from linearize import golden, reference
from linearize.config import VARIANTS
from linearize.model import LanguageModel

SMALL = golden.BASE.replace(num_hidden_layers=2)
CASES = {name: cfg for name, (cfg, _) in golden.MODELS.items()}
CASES.update({name: SMALL.replace(**VARIANTS[name]) for name in VARIANTS if name != "softmax"})


def weights_of(cfg):
    weights = golden.random_weights(cfg.replace(conv_kernel=max(cfg.conv_kernel, 1)), np.random.default_rng(3))
    if not cfg.conv_kernel:
        weights = {k: v for k, v in weights.items() if "conv_taps" not in k}
    return weights


@pytest.mark.parametrize("name", CASES)
def test_training_form_equals_the_definition(name):
    cfg = CASES[name]
    weights = weights_of(cfg)
    model = LanguageModel(cfg)
    state = {}
    for key, value in weights.items():
        value = torch.from_numpy(value)
        if key.endswith("global_decay"):
            key, value = key.replace("global_decay", "decay_logit"), torch.logit(value)
        state[key] = value
    model.load_state_dict(state)
    tokens = np.random.default_rng(5).integers(0, cfg.vocab_size, 75)
    want = reference.logits(cfg.to_hf(0), weights, tokens)
    with torch.no_grad():
        got = model(torch.from_numpy(tokens)[None])[0].numpy()
    assert np.abs(got - want).max() < 2e-4 * max(1.0, np.abs(want).max())


def test_later_tokens_do_not_reach_back():
    model = LanguageModel(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, SMALL.vocab_size, (1, 60))
    changed = tokens.clone()
    changed[0, 40:] = 1
    with torch.no_grad():
        assert torch.equal(model(tokens)[0, :40], model(changed)[0, :40])
