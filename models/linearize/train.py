"""One resumable training loop for every stage; the stages differ in their objective."""
import json
import os
import time
from dataclasses import dataclass

import torch

from . import data, optim


@dataclass
class TrainOptions:
    out: str
    minutes: float = 10.0
    batch: int = 64
    length: int = 1024
    optimizer: str = "adamw"
    lr: float = 2e-3
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    warmup: float = 0.02  # share of the budget with rising rate
    hold: float = 0.0  # share of the budget before the rate starts to fall
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    save_minutes: float = 2.0
    max_tokens: int = 0


def schedule(progress, warmup, hold):
    """Linear warm-up, a plateau up to `hold`, linear decay to zero, all as shares of the budget."""
    rise = min(progress / warmup, 1.0) if warmup else 1.0
    return rise * min(1.0, max(0.0, 1.0 - progress) / (1.0 - hold))


class Checkpoint:
    """Everything needed to go on after an interruption, written to a temporary name first."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "checkpoint.pt")

    def save(self, model, optimizers, generator, state):
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "generator": generator.get_state(), "state": state}, self.path + ".part")
        os.replace(self.path + ".part", self.path)

    def restore(self, model, optimizers, generator):
        if not os.path.exists(self.path):
            return {"step": 0, "tokens": 0, "seconds": 0.0, "done": False}
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        return saved["state"]


def run(model, objective, stream_path, options):
    """Trains until the time budget (or the token budget) is used up. `objective(x, y)` returns the loss.

    The clock starts after the first step, which compiles the model.
    """
    o = options
    os.makedirs(o.out, exist_ok=True)
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")
    model.cfg.save(os.path.join(o.out, "model.json"))
    model.to(o.device)
    stream = data.load(stream_path, o.device)
    optimizers = optim.build(model, o.optimizer, o.lr, o.matrix_lr, o.weight_decay)
    generator = torch.Generator().manual_seed(o.seed)
    checkpoint = Checkpoint(o.out)
    state = checkpoint.restore(model, optimizers, generator)
    loss_of = torch.compile(objective) if o.compile else objective
    budget = o.minutes * 60
    log = open(os.path.join(o.out, "log.jsonl"), "a")
    # After an interruption the clock goes on from where the checkpoint left it.
    begin, shown, saved = time.time() - state["seconds"], 0.0, time.time()
    average, first_step = None, True
    while not state["done"]:
        x, y = data.random_batch(stream, o.batch, o.length, generator, o.device)
        loss = loss_of(x, y)
        loss.backward()
        if first_step:
            loss.item()  # waits for the device
            begin, first_step = time.time() - state["seconds"], False
        progress = (time.time() - begin) / budget
        if o.max_tokens:
            progress = max(progress, state["tokens"] / o.max_tokens)
        scale = schedule(progress, o.warmup, o.hold)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
            optimizer.zero_grad()
        state["step"] += 1
        state["tokens"] += x.numel()
        state["seconds"] = time.time() - begin
        state["done"] = progress >= 1.0
        loss = loss.detach()
        average = loss if average is None else 0.95 * average + 0.05 * loss
        if time.time() - shown > 10 or state["done"]:
            shown = time.time()
            row = {"step": state["step"], "tokens": state["tokens"], "loss": round(float(loss), 4),
                   "average": round(float(average), 4), "seconds": round(state["seconds"], 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(f"step {row['step']}  loss {row['average']:.3f}  {state['tokens'] / 1e6:.2f} M tokens  "
                  f"{state['tokens'] / max(state['seconds'], 1e-3):.0f} tokens/s  {100 * min(progress, 1):.0f} %  "
                  f"{max(0.0, budget - state['seconds']) / 60:.1f} min left", flush=True)
        if time.time() - saved > o.save_minutes * 60 or state["done"]:
            saved = time.time()
            checkpoint.save(model, optimizers, generator, state)
    return state
