"""The losses of the stages: language modelling, attention transfer, distillation, Medusa heads, recurrent head."""
import torch
import torch.nn.functional as F

from . import recurrent


def language_model(model, device="cpu"):
    def loss(x, y):
        with torch.autocast(device, torch.bfloat16):
            return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
    return loss


def distill(student, teacher, kl_share, device="cpu"):
    """kl_share * KL(teacher || student) + (1 - kl_share) * next-token loss, both per token."""
    teacher.eval().requires_grad_(False)

    def loss(x, y):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                target = F.log_softmax(teacher(x).float().flatten(0, 1), dim=-1)
            logits = student(x).float().flatten(0, 1)
        kl = F.kl_div(F.log_softmax(logits, dim=-1), target, log_target=True, reduction="batchmean")
        return kl_share * kl + (1 - kl_share) * F.cross_entropy(logits, y.flatten())
    return loss


def attention_transfer(student, teacher, device="cpu"):
    """Each student attention imitates the teacher's on the teacher's own hidden states.

    The squared error of a layer is divided by that layer's mean square, so that no layer dominates.
    """
    teacher.eval().requires_grad_(False)

    def loss(x, _):
        with torch.autocast(device, torch.bfloat16):
            rope = teacher.rope(x.shape[1], x.device)
            hidden = teacher.model.embed_tokens(x)
            total = 0.0
            for ours, theirs in zip(student.model.layers, teacher.model.layers):
                with torch.no_grad():
                    normed = theirs.input_layernorm(hidden)
                    target = theirs.self_attn(normed, rope).float()
                    hidden = hidden + target
                    hidden = hidden + theirs.mlp(theirs.post_attention_layernorm(hidden))
                got = ours.self_attn(normed, rope).float()
                total = total + (got - target).square().mean() / (target.square().mean() + 1e-6)
        return total / len(student.model.layers)
    return loss


def medusa(heads, target, device="cpu", depth_weight=0.8):
    """KL from the target's own distribution n + 2 tokens ahead to what head n says, on running text.

    The target's distribution is a better teacher than the one token that followed. Deeper heads weigh less, as in
    Medusa (arXiv 2401.10774, equation 1).
    """
    target.eval().requires_grad_(False)

    def loss(x, _):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                hidden = target.hidden(x)
                logits = target.unembed(hidden)
            total = 0.0
            for n, guess in enumerate(heads(hidden)):
                ahead = n + 1  # logits[t] already is about token t + 1
                want = F.log_softmax(logits[:, ahead:].float().flatten(0, 1), dim=-1)
                got = F.log_softmax(target.unembed(guess[:, :-ahead]).float().flatten(0, 1), dim=-1)
                total = total + depth_weight ** n * F.kl_div(got, want, log_target=True, reduction="batchmean")
        return total / len(heads.heads)
    return loss


def recurrent_head(head, target, levels, device="cpu", depth_weight=0.8):
    """KL from the target's own distribution to the head's at every place and depth, the tokens between given."""
    target.eval().requires_grad_(False)

    def loss(x, _):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                hidden = target.hidden(x)
                logits = target.unembed(hidden)
            total, weights = 0.0, 0.0
            for n, state in recurrent.unrolled(head, target, hidden, x, levels):
                want = F.log_softmax(logits[:, n:].float().flatten(0, 1), dim=-1)
                got = F.log_softmax(target.unembed(state).float().flatten(0, 1), dim=-1)
                weight = depth_weight ** (n - 1)
                total = total + weight * F.kl_div(got, want, log_target=True, reduction="batchmean")
                weights += weight
        return total / weights
    return loss
