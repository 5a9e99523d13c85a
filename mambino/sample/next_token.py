"""The next token of rows, from what the model gives for it: temperature, top-k, min-p, top-p, and
chance.

    ids = sample_token(logits, temperature=0.8, top_k=200, generator=generators)    # (B,)
    ids = choose(logits, u, temperature=0.8, top_k=200)     # the same at u (B,), which waits for no card

Letters of the shapes: B rows, V vocabulary, k candidates.
"""
import torch

from mambino.configurator import fail
from mambino.kernels import cpu, native

NO_NUMBERS = 'the model gives no finite numbers for the next token: its weights are damaged, or training ruined them'


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws a token for each row of logits (B, V) → (B,) int64. The filters apply in the order
    top-k, min-p, top-p.

    A token of score -inf is never drawn. generator: see `uniform`. min-p: Nguyen et al. 2024; top-p
    (nucleus): Holtzman et al. 2020."""
    logits = logits.float()
    if temperature == 0:
        return fast_topk(logits, 1)[1][:, 0]
    cumulative, index = chances(logits, temperature, top_k, top_p, min_p)
    if not bool(cumulative[:, -1].isfinite().all()):
        fail(NO_NUMBERS)
    place = place_of(uniform(generator, len(logits), logits.device), cumulative)            # (B, 1)
    ids = place if index is None else index.gather(1, place)
    return ids[:, 0]


def choose(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """sample_token at u (B,) of [0, 1), on a card that is not waited for: -1 where there are no numbers."""
    logits = logits.float()
    if temperature == 0:
        best, index = fast_topk(logits, 1)
        return torch.where(best.isfinite(), index, -1)[:, 0]
    cumulative, index = chances(logits, temperature, top_k, top_p, min_p)
    place = place_of(u, cumulative).clamp(max=cumulative.shape[1] - 1)
    ids = place if index is None else index.gather(1, place)
    return torch.where(cumulative[:, -1:].isfinite(), ids, -1)[:, 0]


def chances(logits, temperature, top_k, top_p, min_p):
    """→ (sums (B, k) of what the candidates' probabilities are in proportion to, their ids (B, k),
    or None for all). logits (B, V) fp32."""
    index = None
    if 0 < top_k < logits.shape[-1]:
        logits, index = fast_topk(logits, top_k)            # what follows costs k, not V
        top = logits[:, :1]
    else:
        top = logits.amax(-1, keepdim=True)
    # probabilities / that of the likeliest; in place: to get memory for (B, V) takes longer than to fill it
    weights = (logits - top).div_(min(max(temperature, 1e-30), 1e30)).exp_()
    if min_p > 0:
        weights.masked_fill_(weights < min_p, 0)
    if top_p < 1:
        enough = top_p * weights.sum(-1, keepdim=True)
        if index is None:
            weights, index = nucleus_candidates(weights, enough)
        before = weights.cumsum(-1) - weights               # the token that reaches top_p stays
        before[:, 0] = -1                                   # and so does the first, be top_p ever so small
        weights.masked_fill_(before >= enough, 0)
    return weights.cumsum_(-1), index


def place_of(u, cumulative):
    """Which of the candidates, whose sums are cumulative (B, k), is at u (B,) of [0, 1) → (B, 1)."""
    u = u.clamp(max=1 - torch.finfo(u.dtype).eps)           # less than all, rounded or not
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)


def seed_of(seed, number):
    """The seed of row `number`, from that of all rows; an odd factor: no two are alike."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def uniform(generator, B, device=None):
    """(B,) numbers in [0, 1): from one generator, or from a list with one for each row, which then
    depends on no other. device: where they are wanted; None: where they are drawn."""
    if isinstance(generator, list):
        u = torch.cat([torch.rand(1, generator=g) for g in generator])
    else:
        u = torch.rand(B, generator=generator, device=generator.device if generator else 'cpu')
    return u if device is None else u.to(device, non_blocking=True)     # waits for no GPU


def fast_topk(x, k):
    """x.topk(k) of x (B, V) → (B, k) values in order, indices.

    On a CPU in half the time: among V/16 groups, only those with the k largest members can hold one
    of the k largest."""
    B, V = x.shape
    n = V // 16
    if x.device.type != 'cpu' or 4 * k > n:
        return x.topk(k)
    largest_of_group = x[:, :16 * n].view(B, 16, n).amax(1)     # (B, n); group g: g, g + n, …
    groups = largest_of_group.topk(k, sorted=False).indices             # (B, k)
    index = (groups[:, None] + torch.arange(0, 16 * n, n)[:, None]).flatten(1)      # (B, 16 k)
    rest = torch.arange(16 * n, V).expand(B, -1)                        # what is in no group
    index = torch.cat((index, rest), 1)
    values, place = x.gather(1, index).topk(k)
    return values, index.gather(1, place)


def nucleus_candidates(weights, enough):
    """The largest of weights (B, V) in order, at least so many that they sum up to `enough` (B, 1),
    and their indices.

    Sorting all is what a CPU is slow at; those that are not very small do, or mostly some
    hundred."""
    if cpu.applies(weights):
        # all that are smaller sum up to half of what may be missing, at most
        least = (weights.sum(-1, keepdim=True) - enough) / (2 * weights.shape[-1])
        values, index = native.sort_above(weights, least)
        if bool((values.sum(-1, keepdim=True) >= enough).all()):
            return values, index
    elif weights.device.type == 'cpu' and weights.shape[-1] > 4096:
        values, index = fast_topk(weights, 512)
        if bool((values.sum(-1, keepdim=True) >= enough).all()):
            return values, index
    return weights.sort(descending=True)


def logprobs_of(logits, ids, n, vocab_size):
    """Of each row's token ids (B,) and of the n likeliest, under the model as it is, logits (B, V)
    → [(logprob, [(id, logprob), …]), …]."""
    logprobs = logits.float().log_softmax(-1)                           # (B, V)
    ids = ids.to(logits.device, non_blocking=True)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    best = logprobs[:, :vocab_size].topk(min(n, vocab_size))
    likeliest = zip(best.indices.tolist(), best.values.tolist())
    return [(logprob, list(zip(*pair))) for logprob, pair in zip(own, likeliest)]
