"""Every stage of the command line, on a toy recipe, and what the export holds."""
import itertools
import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from jinja2 import Environment
from safetensors.numpy import load_file

from linearize import __main__ as cli
from linearize import data, medusa, objectives, own_text, prompts, recurrent, reference
from linearize import tokenizer as tok

SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, group_size=16, conv_kernel=8)
RECIPE = {
    "data": {"text_bytes": 100000, "chat_bytes": 2000, "tokenizer_bytes": 100000, "vocab_size": 300, "seed": 1},
    "model": SHAPE,
    "draft_model": dict(SHAPE, num_hidden_layers=1),
    "train": {"minutes": 1, "batch": 4, "length": 64, "optimizer": "muon", "seed": 1},
    "distill": {"kl_share": 0.5},
    "draft": {"kl_share": 1.0, "overlap_weight": 1.0},
    "medusa_heads": {"count": 2, "layers": 1},
    "recurrent_head": {"intermediate_size": 24, "levels": 3},
    "recurrent": {"overlap_weight": 1.0},
}


def run(*arguments):
    sys.argv = ["linearize", *map(str, arguments)]
    cli.main()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    os.chdir(folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    text = "".join(f"The {i} ravens sat upon gate number {i * 7}.\n<|endoftext|>\n" for i in range(900))
    (folder / "text.txt").write_text(text)
    (folder / "test.txt").write_text(text[:20000])
    turn = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    (folder / "chat.jsonl").write_text((json.dumps(turn) + "\n") * 5)
    run("data", "--recipe", "recipe.json", "--text", "text.txt", "--chat", "chat.jsonl", "--test", "test.txt",
        "--valid", "test.txt", "--out", "data")
    return folder


def train(stage, out, *extra, tokens=2000):
    run(stage, "--recipe", "recipe.json", "--data", "data", "--out", out, "--device", "cpu", "--max-tokens", tokens,
        *extra)


def test_every_stage_runs_and_training_learns(work):
    train("lm", "teacher", "--variant", "softmax", tokens=12000)
    train("transfer", "transferred", "--teacher", "teacher")
    train("distill", "student", "--teacher", "teacher", "--init", "transferred")
    train("distill", "draft", "--role", "draft", "--teacher", "student")
    rows = [json.loads(line) for line in open("teacher/log.jsonl")]
    assert rows[-1]["loss"] < rows[0]["loss"]
    run("eval", "--model", "student", "--data", "data", "--device", "cpu", "--lengths", 64, 256, "--distances", 32, 64,
        "--tokens", 2048, "--int8", "--draft", "draft", "--out", "eval.json")
    result = json.load(open("eval.json"))
    assert set(result["copy_probe"]) == {"32", "64"} and len(result["lengths"]) == 2
    run("sample", "--model", "student", "--data", "data", "--prompt", "The", "--count", 3)


def test_a_finished_training_is_not_repeated(work):
    train("lm", "again")
    before = open("again/log.jsonl").read()
    train("lm", "again")
    assert open("again/log.jsonl").read() == before


def test_export_holds_the_trained_model(work):
    train("lm", "small")
    run("export", "--model", "small", "--data", "data", "--out", "exported")
    config = json.load(open("exported/config.json"))
    stored = load_file("exported/model.safetensors")
    weights = {}
    for name, value in stored.items():
        if name.endswith("_scale"):
            continue
        weights[name] = value * stored[name + "_scale"][:, None] if value.dtype == np.int8 else value
    tokens = np.arange(40) * 7 % 300
    want = reference.logits(config, weights, tokens)
    model = cli.export.rounded_copy_(cli.load_model("small"))
    with torch.no_grad():
        got = model(torch.from_numpy(tokens)[None])[0].numpy()
    assert np.abs(got - want).max() < 1e-3


def test_training_sees_what_the_template_renders():
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    rendered = Environment().from_string(tok.CHAT_TEMPLATE).render(
        messages=messages, bos_token=tok.SPECIALS[0], add_generation_prompt=False)
    assert rendered == tok.render_chat(messages)


def test_medusa_heads_learn_and_are_exported_without_unembeddings(work):
    train("lm", "trunk", tokens=8000)
    train("medusa", "heads", "--target", "trunk", tokens=8000)
    rows = [json.loads(line) for line in open("heads/log.jsonl")]
    assert rows[-1]["loss"] < rows[0]["loss"]
    run("export", "--model", "trunk", "--medusa", "heads", "--data", "data", "--out", "with_heads")
    assert json.load(open("with_heads/medusa_config.json")) == {
        "version": 1, "medusa_num_heads": 2, "medusa_num_layers": 1}
    stored = load_file("with_heads/medusa.safetensors")
    assert set(stored) == {f"{n}.0.linear.{part}" for n in (0, 1) for part in ("weight", "weight_scale", "bias")}


def test_medusa_head_is_scored_at_the_place_it_guesses():
    """A target that always says token + 1 after a token, and heads that know it, agree everywhere."""
    class Counting:
        cfg = None

        def hidden(self, tokens):
            return torch.nn.functional.one_hot((tokens + 1) % 50, 50).float()

        def unembed(self, hidden):
            return hidden

    class Ahead(torch.nn.Module):
        heads = [None, None]

        def forward(self, hidden):
            return [hidden.roll(n + 1, dims=-1) for n in range(2)]

    stream = np.arange(400).astype(np.uint16) % 50
    assert medusa.agreement(Counting(), Ahead(), stream, 40, 10, top=(1,)) == {1: [1.0, 1.0]}


def test_recurrent_head_learns_from_an_exported_target_and_is_exported(work):
    train("lm", "trunk", tokens=8000)
    run("export", "--model", "trunk", "--data", "data", "--out", "with_head")
    before = open("with_head/model.safetensors", "rb").read()
    train("recurrent", "head", "--target", "with_head", tokens=8000)
    rows = [json.loads(line) for line in open("head/log.jsonl")]
    assert rows[-1]["loss"] < rows[0]["loss"]
    run("export", "--model", "with_head", "--recurrent", "head", "--heads-only", "--data", "data", "--out", "with_head")
    assert open("with_head/model.safetensors", "rb").read() == before
    assert json.load(open("with_head/recurrent_head_config.json")) == {
        "version": 1, "intermediate_size": 24, "rms_norm_eps": 1e-5}
    stored = load_file("with_head/recurrent_head.safetensors")
    assert stored["gate_proj.weight"].shape == (24, 64) and stored["gate_proj.weight"].dtype == np.int8
    assert stored["down_proj.weight_scale"].shape == (32,)
    train("recurrent", "longer", "--target", "with_head", "--init", "with_head", tokens=2000)
    begun = json.loads(open("longer/log.jsonl").readline())["loss"]
    assert begun < (rows[0]["loss"] + rows[-1]["loss"]) / 2


def test_recurrent_head_says_what_the_reference_says():
    cfg = cli.ModelConfig(**SHAPE)
    torch.manual_seed(3)
    target, head = cli.LanguageModel(cfg), recurrent.RecurrentHead(cfg, 24)
    torch.nn.init.normal_(head.down_proj.weight, std=0.3)
    hidden, tokens = torch.randn(1, 6, 32), torch.arange(6)[None] * 31 % 300
    weights = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    embedding = target.model.embed_tokens.weight.detach().numpy()
    with torch.no_grad():
        for n, state in recurrent.unrolled(head, target, hidden, tokens, 3):
            want = reference.recurrent_logits(weights, cfg.rms_norm_eps, hidden[0, :6 - n].numpy(),
                                              [tokens[0, i:6 - n + i].numpy() for i in range(1, n + 1)], embedding, embedding)
            assert np.abs(target.unembed(state)[0].numpy() - want[-1]).max() < 1e-4


def test_an_exported_folder_is_read_back_as_it_was_rounded(work):
    train("lm", "small")
    run("export", "--model", "small", "--data", "data", "--out", "exported")
    tokens = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        want = cli.export.rounded_copy_(cli.load_model("small"))(tokens)
        assert (cli.load_model("exported")(tokens) - want).abs().max() < 1e-4


def test_recurrent_head_is_scored_at_the_place_it_guesses():
    """A target that says what followed the last token plus one, and a head that adds one to the token it is shown."""
    class Body:
        @staticmethod
        def embed_tokens(tokens):
            return torch.nn.functional.one_hot(tokens % 50, 50).float()

    class Counting:
        model = Body

        def hidden(self, tokens):
            return self.model.embed_tokens(tokens + 1)

        def unembed(self, hidden):
            return hidden * 50

    stream = np.arange(400).astype(np.uint16) ** 2 % 50
    result = recurrent.agreement(Counting(), lambda state, embedded: embedded.roll(1, dims=-1), stream, 40, 10, levels=3)
    assert result == {"first choice": [1.0] * 3, "overlap": [1.0] * 3}
    result = recurrent.agreement(Counting(), lambda state, embedded: embedded, stream, 40, 10, levels=3)
    assert max(result["first choice"]) == 0


def test_own_text_keeps_prompt_and_reply_and_passes_errors_on(work, monkeypatch):
    asked = []

    def reply(server, prompt, temperature, seed):
        asked.append((temperature, seed))
        return " REPLY"

    monkeypatch.setattr(own_text, "complete", reply)
    run("own-text", "--server", "http://server", "--prompts", long_text(), "--chat", "chat.jsonl", "--out", "own.txt",
        "--minutes", 0.003, "--temperatures", 0, 1, "--parallel", 2, "--seed", 7)
    documents = data.read_documents("own.txt")
    assert len(documents) == len(asked) and all(d.endswith(" REPLY") for d in documents)
    assert {t for t, _ in asked} == {0.0, 1.0}
    assert sorted(seed for _, seed in asked) == list(range(7000000, 7000000 + len(asked)))

    def fail(*_):
        raise OSError("refused")

    monkeypatch.setattr(own_text, "complete", fail)
    with pytest.raises(OSError, match="refused"):
        own_text.collect("http://server", iter("abc"), "own.txt", 5, [0.0], 2)


def test_prompts_are_of_every_kind_and_the_same_for_a_seed(work):
    def drawn(chat, seed, count=400):
        return list(itertools.islice(prompts.mixed(long_text(), chat, seed=seed), count))

    first = drawn("chat.jsonl", 1)
    assert first == drawn("chat.jsonl", 1) and first != drawn("chat.jsonl", 2)
    shares = {kind: sum(k == kind for k, _ in first) / len(first) for kind in prompts.SHARES}
    assert all(abs(shares[kind] - share) < 0.1 for kind, share in prompts.SHARES.items())
    assert not any(c in prompt for _, prompt in first for c in "[]") and len({p for _, p in first}) > 100
    assert all(p.endswith("Hello<|end|><|assistant|>") for kind, p in first if kind == "chat")
    assert "chat" not in {kind for kind, _ in drawn(None, 1)}


def test_every_template_can_be_filled():
    rng = random.Random(0)
    for template in [t for kind in prompts.QUESTIONS.values() for t in kind] + list(prompts.STRUCTURED):
        for _ in range(20):
            assert not set("{}[]") & set(prompts.fill(prompts.fill_once(template, rng), rng))


def test_overlap_is_what_rejection_sampling_accepts():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.8, 0.1])
    assert objectives.overlap(p.log(), q.log()).item() == pytest.approx(0.5)
    assert objectives.overlap(p.log(), p.log()).item() == pytest.approx(1.0)


def long_text():
    line = "The ravens sat upon the gate and talked of the weather. " * 8
    with open("text_long.txt", "w") as f:
        f.write("\n".join([line] * 20) + "\n<|endoftext|>\n")
    return "text_long.txt"


def test_the_whole_pipeline_runs_once_and_ships_the_better_target(work, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["all", "--recipe", "recipe.json", "--data", "data", "--out", "runs", "--scale", "0.00001"]
    run(*arguments)
    score = {name: json.load(open(f"runs/eval/valid-{name}.json"))["lengths"][0]["perplexity"]
             for name in ("distilled", "direct")}
    assert os.readlink("runs/target") == min(score, key=score.get)
    for path in ("target/model.safetensors", "target/medusa.safetensors", "draft/model.safetensors"):
        assert os.path.exists("runs/bundled/" + path)
    assert {"medusa_agreement", "draft_agreement", "copy_probe"} <= set(json.load(open("runs/eval/shipped.json")))
    capfd.readouterr()
    run(*arguments)
    assert capfd.readouterr().out == ""
