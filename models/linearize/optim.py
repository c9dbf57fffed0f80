"""Muon for the matrices between embedding and unembedding, AdamW for everything else."""
import torch


def orthogonalize(batch, steps=5):
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix, on a stack of matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = batch.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.transpose(-1, -2)
    return x.to(batch.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.add_(update, alpha=-group["lr"] * scale)


def build(model, kind, lr, matrix_lr=0.02, weight_decay=0.0):
    """A list of optimizers; every group carries `peak`, its learning rate before the schedule."""
    matrices, rest, scalars = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or name.endswith("conv_taps"):
            scalars.append(p)
        elif kind == "muon" and "embed" not in name and "lm_head" not in name:
            matrices.append(p)
        else:
            rest.append(p)
    fused = next(model.parameters()).is_cuda
    groups = [dict(params=rest, weight_decay=weight_decay), dict(params=scalars, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=fused)]
    if matrices:
        optimizers.append(Muon(matrices, lr=matrix_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
