"""The losses of the stages: language modelling, attention transfer, distillation, Medusa heads, recurrent head."""
import torch
import torch.nn.functional as F

from . import recurrent


def language_model(model, device="cpu"):
    def loss(x, y):
        with torch.autocast(device, torch.bfloat16):
            return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
    return loss


def distill(student, teacher, kl_share, device="cpu", overlap_weight=0.0):
    """kl_share * KL(teacher || student) + (1 - kl_share) * next-token loss, both per token.

    A draft is accepted as often as sum min(teacher, student), its overlap: overlap_weight adds what that lacks to 1.
    """
    teacher.eval().requires_grad_(False)

    def loss(x, y):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                target = F.log_softmax(teacher(x).float().flatten(0, 1), dim=-1)
            logits = student(x).float().flatten(0, 1)
        got = F.log_softmax(logits, dim=-1)
        total = kl_share * F.kl_div(got, target, log_target=True, reduction="batchmean")
        if kl_share < 1:
            total = total + (1 - kl_share) * F.cross_entropy(logits, y.flatten())
        if overlap_weight:
            total = total + overlap_weight * (1 - overlap(got, target).mean())
        return total
    return loss


def overlap(got, want):
    """sum min(p, q) of log distributions [..., V]: how often a draft from q is accepted by p."""
    return torch.minimum(got, want).exp().sum(-1)


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


def recurrent_head(head, target, levels, device="cpu", overlap_weight=0.0):
    """KL from the target's own distribution to the head's at every place and depth, the tokens between given, plus
    overlap_weight times what the overlap lacks to 1.

    A depth counts at a place as much as it would be reached there: by the product of the overlaps above it. So the head
    spends itself on what makes drafts longer, and need not say what follows a token that it would not have drafted.
    """
    target.eval().requires_grad_(False)

    def loss(x, _):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                hidden = target.hidden(x)
                want = F.log_softmax(target.unembed(hidden).float(), dim=-1)
            total, weight, reached = 0.0, 0.0, torch.ones(x.shape, device=x.device)
            for n, state in recurrent.unrolled(head, target, hidden, x, levels):
                got = F.log_softmax(target.unembed(state).float(), dim=-1)
                accepted = overlap(got, want[:, n:])
                lost = F.kl_div(got, want[:, n:], log_target=True, reduction="none").sum(-1)
                reached = reached[:, :accepted.shape[1]]
                total = total + (reached * (lost + overlap_weight * (1 - accepted))).mean()
                weight = weight + reached.mean()
                reached = reached * accepted.detach()
        return total / weight
    return loss
