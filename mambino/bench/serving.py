"""The section serve: the server's scheduler on a CPU, beside sample.py's rows, in one process.

    python -m mambino.bench --sections=serve --kinds=mamba,gpt --ways=float32,int8

Weights are random, prompts and answers of a fixed length. Three questions, by turns in every round, so
that a busy machine is unfair to nobody:

    tokens/s of so many clients at once; of 16 against sample.py's 16 rows, prompts included, by the clock
      and by the processor's time, of which others take nothing
    first token of a prompt while 15 others run, against the same prompt alone
    time between two tokens of those others meanwhile, against theirs without it
"""
import threading
import time
from statistics import median

import torch

from mambino.bench.generation import config_of
from mambino.bench.turns import HERE
from mambino.sample.generation import Rows, prefill
from mambino.sample.text import Writer
from mambino.serve.scheduler import Scheduler
from mambino.serve.work import Done, Failed, Job, Room, Token
from mambino.tokenizer import build_tokenizer
from mambino.weights.checkpoint import build
from mambino.weights.loading import prepare_model

SAMPLING = dict(temperature=0.8, top_k=200)     # sample.py's
OTHERS = 15             # that run while a prompt is read
FULL = 16               # clients, and rows of sample.py


def words(vocab_size):
    """A tokenizer of so many ids, each of which is a word."""
    tok = build_tokenizer('byte')
    tok.vocab_size = vocab_size
    tok.table = [f' w{i}'.encode() for i in range(vocab_size)]
    tok.pieces = tok.pieces._replace(table=tok.table)
    return tok


class Client:
    """One job, and when its events came."""

    def __init__(self, scheduler, ids, max_tokens, seed=0):
        self.times = []                         # of its tokens
        self.over = threading.Event()
        self.first = threading.Event()
        self.problem = None
        self.began = time.perf_counter()
        job = Job(ids, max_tokens, seed=seed, ignore_eos=True, **SAMPLING)
        self.ticket = scheduler.submit(job, self.take)

    def take(self, event):
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
            self.first.set()
        elif isinstance(event, (Done, Failed)):
            self.problem = getattr(event, 'message', None)
            self.first.set()
            self.over.set()

    def wait(self):
        self.over.wait()
        if self.problem:
            raise RuntimeError(self.problem)


class Contest:
    """A model, its scheduler, and what is asked of them."""

    def __init__(self, kind, way, settings):
        family, fields = config_of(kind, settings)
        torch.manual_seed(0)
        self.net = build(family, fields).eval()
        prepare_model(self.net, 'cpu', 'float32', precision='' if way == 'float32' else way)
        self.settings = settings
        self.tok = words(settings.vocab_size)
        self.generator = torch.Generator().manual_seed(1)
        most = max(max(settings.clients), FULL)
        self.scheduler = Scheduler(self.net, self.tok, Room(most, 4 * most, 0.0))

    def prompt(self, tokens):
        """Another one each time: nothing of it was read."""
        return torch.randint(self.tok.vocab_size, (tokens,), generator=self.generator).tolist()

    def clients(self, count):
        """Seconds until so many clients have their answers."""
        prompts = [self.prompt(self.settings.prompt) for _ in range(count)]
        began = time.perf_counter()
        clients = [Client(self.scheduler, ids, self.settings.new_tokens, seed) for seed, ids in enumerate(prompts)]
        for client in clients:
            client.wait()
        return time.perf_counter() - began

    @torch.no_grad()
    def rows(self, count):
        """The same by sample.py's way."""
        prompts = [self.prompt(self.settings.prompt) for _ in range(count)]
        began = time.perf_counter()
        rows = Rows(self.net, self.tok.vocab_size)
        rows.add([prefill(self.net, ids) for ids in prompts])
        writers = [Writer(self.tok, before=ids) for ids in prompts]
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        for n in range(self.settings.new_tokens):
            ids = rows.draw(generator=generators, **SAMPLING)
            for writer, i in zip(writers, ids.tolist()):
                writer.feed(i)
            if n + 1 < self.settings.new_tokens:
                rows.advance(ids)
        return time.perf_counter() - began

    @torch.no_grad()
    def reading(self, tokens):
        """Seconds that sample.py takes to read a prompt."""
        began = time.perf_counter()
        prefill(self.net, self.prompt(tokens))
        return time.perf_counter() - began

    def first_token(self, tokens):
        """Seconds until the first token of a prompt."""
        client = Client(self.scheduler, self.prompt(tokens), 1)
        client.wait()
        return client.times[0] - client.began

    def beside(self, tokens):
        """→ (seconds until the first token of a prompt while others run, the times between tokens of those
        before it came, and meanwhile)."""
        others = [Client(self.scheduler, self.prompt(8), 10**6, seed) for seed in range(OTHERS)]
        for other in others:
            other.first.wait()
        time.sleep(self.settings.seconds)
        came = time.perf_counter()
        seconds = self.first_token(tokens)
        first = came + seconds
        for other in others:
            other.ticket.cancel()
            other.over.wait()
        before, meanwhile = [], []
        begun = max(other.times[0] for other in others)     # all of them run
        for other in others:
            for a, b in zip(other.times, other.times[1:]):
                if begun < a and b < came:
                    before.append(b - a)
                elif came < b and a < first:
                    meanwhile.append(b - a)
        return seconds, before, meanwhile

    def close(self):
        self.scheduler.close()


def measure(settings):
    """The rows of all kinds and ways, shown as they come."""
    rows = []
    settings.clients = [int(number) for number in settings.clients.split(',')]
    for kind in settings.kinds.split(','):
        for way in settings.ways.split(','):
            contest = Contest(kind, way, settings)
            try:
                row = dict(section='serve', name=kind, label=f'{kind} {way}', dtype=way, by='ours', root=HERE, times=[])
                row.update(measured(contest, settings))
                row['bytes_a_row'] = contest.scheduler.stats()['bytes_a_row']
            finally:
                contest.close()
            show(row, settings)
            rows.append(row)
    return rows


def measured(contest, settings):
    """The figures of a contest, medians of the rounds' own ratios."""
    contest.clients(2)
    contest.rows(2)
    rounds = []
    for _ in range(settings.rounds):
        tokens = settings.new_tokens
        speeds = {count: count * tokens / contest.clients(count) for count in settings.clients}
        began = time.process_time()
        own = FULL * tokens / contest.rows(FULL)
        between = time.process_time()
        full = FULL * tokens / contest.clients(FULL)
        work = (between - began) / (time.process_time() - between)
        alone = contest.first_token(settings.long_prompt)
        reading = contest.reading(settings.long_prompt)
        seconds, before, meanwhile = contest.beside(settings.long_prompt)
        rounds.append(dict(
            speeds=speeds, rows=own, against_rows=full / own, work=work,
            first=seconds, first_alone=alone, reading=reading,
            against_alone=seconds / alone, against_reading=seconds / reading,
            between_before=median(before), between=median(meanwhile),
            mean_ratio=mean(meanwhile) / mean(before), median_ratio=median(meanwhile) / median(before),
            latest_ratio=latest(meanwhile) / median(before)))
    figures = {name: median(one[name] for one in rounds) for name in rounds[0] if name != 'speeds'}
    figures['speeds'] = {count: median(one['speeds'][count] for one in rounds) for count in settings.clients}
    return figures


def mean(numbers):
    return sum(numbers) / len(numbers)


def latest(numbers):
    """What one in twenty exceeds."""
    return sorted(numbers)[int(0.95 * (len(numbers) - 1))]


def show(row, settings):
    print(f'\n{row["label"]}: {row["bytes_a_row"] / 1e6:,.1f} MB a row')
    print('  clients   ' + ''.join(f'{count:>8}' for count in row['speeds']))
    print('  tokens/s  ' + ''.join(f'{speed:>8,.0f}' for speed in row['speeds'].values()))
    print(f'  {FULL} clients against {FULL} rows of sample.py ({row["rows"]:,.0f} tokens/s): '
          f'{row["against_rows"]:.2f}, by the processor\'s time {row["work"]:.2f}')
    print(f'  first token of {settings.long_prompt:,} tokens beside {OTHERS} others: {row["first"]:.2f} s, '
          f'{row["against_alone"]:.2f} × alone, {row["against_reading"]:.2f} × sample.py\'s reading')
    print(f'  between tokens of the others meanwhile: {row["mean_ratio"]:.2f} × without on average, '
          f'{row["median_ratio"]:.2f} × in the middle, {row["latest_ratio"]:.2f} × at the 95th percentile '
          f'({row["between_before"] * 1e3:.1f} ms without)', flush=True)
