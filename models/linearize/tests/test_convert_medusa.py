"""Published Medusa heads become what the server reads, and a pickle that would run code is refused."""
import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file

from linearize import __main__ as cli


def convert(*arguments):
    sys.argv = ["linearize", "convert-medusa", *map(str, arguments)]
    cli.main()


@pytest.fixture
def published(tmp_path):
    torch.manual_seed(1)
    stored = {}
    for n in range(2):
        stored[f"{n}.0.linear.weight"] = torch.randn(8, 8, dtype=torch.float16)
        stored[f"{n}.0.linear.bias"] = torch.randn(8, dtype=torch.float16)
        stored[f"{n}.1.weight"] = torch.randn(20, 8, dtype=torch.float16)
    torch.save(stored, tmp_path / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "somewhere"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, stored


def test_names_shapes_and_bits_are_kept(published):
    folder, stored = published
    convert("--heads", folder, "--out", folder)
    written = load_file(folder / "medusa.safetensors")
    assert set(written) == set(stored)
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    assert json.loads((folder / "medusa_config.json").read_text()) == {
        "version": 1, "medusa_num_heads": 2, "medusa_num_layers": 1}


def test_int8_is_close(published):
    folder, stored = published
    convert("--heads", folder, "--out", folder, "--int8")
    written = load_file(folder / "medusa.safetensors")
    for name, value in stored.items():
        if value.dim() == 2:
            widened = written[name].float() * written[name + "_scale"][:, None]
            assert (widened - value.float()).abs().max() < 0.02 * value.float().abs().max()


def test_a_pickle_with_code_is_refused(published):
    folder, _ = published

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    with open(folder / "medusa_lm_head.pt", "wb") as f:
        pickle.dump({"0.0.linear.weight": Evil()}, f)
    with pytest.raises(pickle.UnpicklingError):
        convert("--heads", folder, "--out", folder)
    assert not (folder / "owned").exists()
