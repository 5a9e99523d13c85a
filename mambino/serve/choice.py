"""The next token of rows that each have settings of their own: none costs the others anything.

    choice = Choice(jobs)                       # anew when rows come or go
    ids, finite = choice.draw(scores, generators)       # (B,), (B,) bool
    edits = Edits(most, vocab_size, device)     # penalties and biases of rows
    scores = edits.applied(scores)

Each row gets the very token that next_token.sample_token draws with its settings from its
generator. That function takes one setting for all rows. Here rows are in four groups, by what has
to be done: the likeliest; some likeliest; a nucleus; all. In a group temperatures, min-p and top-p
are columns beside the rows, and of the likeliest as many are looked up as the row that wants most
of them.

Letters of the shapes: B rows, n rows of a group, V vocabulary, k candidates.
"""
import math
from collections import Counter

import torch

from mambino.sample.next_token import fast_topk, nucleus_candidates


class Group:
    """Rows that are drawn in the same way: 'likeliest', 'some', 'nucleus' or 'all'."""

    def __init__(self, way, rows, jobs, device):
        def column(values):
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]        # (n, 1)

        self.way = way
        self.rows = rows                                    # their numbers
        self.index = torch.tensor(rows, device=device)
        self.temperature = column([min(max(job.temperature, 1e-30), 1e30) for job in jobs])
        self.min_p = column([job.min_p for job in jobs]) if any(job.min_p > 0 for job in jobs) else None
        # what a nucleus must reach; a row that has none reaches it never
        self.top_p = None
        if any(job.top_p < 1 for job in jobs):
            self.top_p = column([job.top_p if job.top_p < 1 else math.inf for job in jobs])
        self.most = max(job.top_k for job in jobs)
        self.top_k = None
        if way == 'some' and min(job.top_k for job in jobs) < self.most:
            self.top_k = torch.tensor([job.top_k for job in jobs], device=device)[:, None]  # (n, 1)

    def draw(self, logits, u):
        """A token for each row of logits (n, V), fp32; u: (n,) of [0, 1), which the likeliest need
        not → (n,), and whether there was one, (n,). In the order of sample_token."""
        if self.way == 'likeliest':
            best, ids = fast_topk(logits, 1)
            return ids[:, 0], best[:, 0].isfinite()
        index = None
        if self.way == 'some':
            logits, index = fast_topk(logits, self.most)    # (n, k)
            top = logits[:, :1]
        else:
            top = logits.amax(-1, keepdim=True)
        weights = (logits - top).div_(self.temperature).exp_()
        if self.top_k is not None:
            place = torch.arange(self.most, device=weights.device)
            weights.masked_fill_(place >= self.top_k, 0)
        if self.min_p is not None:
            weights.masked_fill_(weights < self.min_p, 0)
        if self.top_p is not None:
            enough = self.top_p * weights.sum(-1, keepdim=True)
            if index is None:
                weights, index = nucleus_candidates(weights, enough)
            before = weights.cumsum(-1) - weights
            before[:, 0] = -1
            weights.masked_fill_(before >= enough, 0)
        cumulative = weights.cumsum_(-1)
        u = u.clamp(max=1 - 2**-23)
        place = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)     # (n, 1)
        place = place.clamp(max=cumulative.shape[1] - 1)    # of numbers that are none
        ids = place if index is None else index.gather(1, place)
        return ids[:, 0], cumulative[:, -1].isfinite()


class Choice:
    """See the top of the file. jobs: of rows 0, 1, …; vocab_size: ids from there on are never drawn."""

    def __init__(self, jobs, vocab_size, device='cpu'):
        self.count = len(jobs)
        self.are_drawn = [job.temperature != 0 for job in jobs]
        rows = {}                                           # {way: its rows}
        for row, job in enumerate(jobs):
            rows.setdefault(way_of(job, vocab_size), []).append(row)
        self.groups = [Group(way, some, [jobs[row] for row in some], device) for way, some in rows.items()]

    def draw(self, scores, generators):
        """A token for each row of scores (B, V), fp32, each from its own generator → (B,) int64,
        and whether there was one, (B,) bool."""
        return self.pick(scores, self.chances(generators))

    def chances(self, generators):
        """(B,) numbers of [0, 1), on the CPU, each from its row's generator; of the likeliest zeros."""
        zero = torch.zeros(1)
        return torch.cat([torch.rand(1, generator=generator) if is_drawn else zero
                          for generator, is_drawn in zip(generators, self.are_drawn)])

    def pick(self, scores, u):
        """What `draw` returns, at u (B,)."""
        u = u.to(scores.device, non_blocking=True)
        if len(self.groups) == 1:
            return self.groups[0].draw(scores, u)
        ids = torch.zeros(self.count, dtype=torch.long, device=scores.device)
        finite = torch.zeros(self.count, dtype=torch.bool, device=scores.device)
        for group in self.groups:
            index = group.index
            ids[index], finite[index] = group.draw(scores.index_select(0, index), u.index_select(0, index))
        return ids, finite

    def pick_or_none(self, scores, u):
        """pick's ids (B,), -1 where there is none."""
        ids, finite = self.pick(scores, u)
        return torch.where(finite, ids, -1)


def way_of(job, vocab_size):
    """Which group a job's row is in."""
    if job.temperature == 0:
        return 'likeliest'
    if 0 < job.top_k < vocab_size:
        return 'some'
    return 'nucleus' if job.top_p < 1 else 'all'


class Edits:
    """What rows do to the scores of ids: divide them (repetition_penalty, of ids in prompt and
    answer; CTRL, Keskar et al. 2019), take from them (presence, frequency, of ids in the answer so
    far), add to them (logit_bias). A row that does nothing has ones and zeros."""

    def __init__(self, most, vocab_size, device='cpu'):
        self.vocab_size = vocab_size
        self.shape = most, vocab_size
        self.device = device
        self.factors = None                 # (R, V), made when the first row needs them
        self.added = None                   # (R, V)
        self.jobs = []                      # of rows
        self.counts = []                    # of rows: {id: how often it is in the answer}

    def add(self, job, ids):
        """The next row. ids: all that are read."""
        row = len(self.jobs)
        if adds(job) and self.added is None:
            self.added = torch.zeros(self.shape, device=self.device)
        if divides(job) and self.factors is None:
            self.factors = torch.ones(self.shape, device=self.device)
        if job.logit_bias:
            index = torch.tensor(list(job.logit_bias), dtype=torch.long)
            self.added[row, index] = torch.tensor(list(job.logit_bias.values()), device=self.device,
                                                  dtype=torch.float32)
        if divides(job):
            self.factors[row, torch.tensor(ids, dtype=torch.long)] = job.repetition_penalty
        self.jobs.append(job)               # last: of one that could not be taken nothing is left
        self.counts.append(Counter())

    def remove(self, row):
        """Takes a row out; the last one gets its number."""
        last = len(self.jobs) - 1
        for job, matrix, clean in ((divides, self.factors, 1), (adds, self.added, 0)):
            if job(self.jobs[last]) and row != last:
                matrix[row] = matrix[last]
            elif job(self.jobs[row]):
                matrix[row] = clean
            if job(self.jobs[last]):
                matrix[last] = clean
        for rows in (self.jobs, self.counts):
            rows[row] = rows[last]
            rows.pop()

    def drawn(self, row, i, is_answer=True):
        """The row goes on with this id; is_answer: not if it only spells what the prompt owed."""
        job = self.jobs[row]
        if divides(job):
            self.factors[row, i] = job.repetition_penalty
        if is_answer and (job.presence_penalty or job.frequency_penalty):
            count = self.counts[row]
            count[i] += 1
            self.added[row, i] = (job.logit_bias.get(i, 0.0) - job.presence_penalty
                                  - job.frequency_penalty * count[i])

    def places(self):
        """What `applied` depends on beside the scores: a graph of it is good as long as this is the same."""
        edits = [matrix is not None and matrix.data_ptr() for matrix in (self.factors, self.added)]
        return *edits, any(map(divides, self.jobs)), any(map(adds, self.jobs))

    def applied(self, scores):
        """Scores (B, V or more) of the tokenizer's ids, edited, in fp32."""
        B = len(scores)
        scores = scores[:, :self.vocab_size].float()
        if any(map(divides, self.jobs)):
            factors = self.factors[:B]
            scores = torch.where(scores < 0, scores * factors, scores / factors)
        if any(map(adds, self.jobs)):
            scores = scores + self.added[:B]
        return scores


def divides(job):
    return job.repetition_penalty != 1


def adds(job):
    return bool(job.presence_penalty or job.frequency_penalty or job.logit_bias)
