"""Tasks of which it is known what a model must keep: how many answers are right, by length and by bytes of state."""
import os
import statistics

from mambino.bench.evidence.learning import Setting
from mambino.bench.evidence.tasks import FIRST, VOCABULARIES
from mambino.bench.plot import write_picture

SMALL = {       # of the tasks: two layers of 64
    'GPT': ('gpt', dict(n_layer=2, n_embd=64, n_head=1, qk_norm=True)),
    'Mamba-2, N=16': ('mamba', dict(n_layer=2, n_embd=64, state_size=16, head_dim=32)),
    'Mamba-2, N=64': ('mamba', dict(n_layer=2, n_embd=64, state_size=64, head_dim=32)),
    'Mamba-3, N=64': ('mamba', dict(n_layer=2, n_embd=64, version=3, state_size=64, head_dim=32)),
    'hybrid, window 32': ('hybrid', dict(n_layer=2, n_embd=64, n_head=1, state_size=16, window=32, qk_norm=True))}


def solved(runs, plan, task, asked, T, steps, batch):
    """{model: the line of its best rate}, and those of all."""
    settings = {(model, rate): Setting(kind, config, task, rate, steps, T, batch, asked=asked)
                for model, (kind, config) in SMALL.items() for rate in plan.rates}
    names = {key: f'{task} {key[0]} {key[1]:g}' for key in settings}
    found = runs.learned({names[key]: setting for key, setting in settings.items()}, 'mambino.bench.evidence.learning')
    lines = {key: found[name] for key, name in names.items()}

    def score(key):
        return sum(lines[key]['right'].values())
    return {model: lines[max((key for key in lines if key[0] == model), key=score)] for model in SMALL}, lines


def table_of(best, lines, rates, asked, words, chance):
    """chance: the share of answers of which a guess is right, of each of asked."""
    columns = ' | '.join(f'{n:,}' for n in asked)
    yield f'| {words} | parameters | state, KB | {columns} | of each rate, mean |'
    yield '| --- | --- | --- |' + ' --- |' * (len(asked) + 1)
    yield '| a guess | | | ' + ' | '.join(f'{share:.1%}' for share in chance) + ' | |'
    for model, line in best.items():
        each = [statistics.mean(lines[model, rate]['right'].values()) for rate in rates]
        yield (f'| {model} | {line["parameters"] / 1000:,.0f}K | {line["state"] / 1000:,.0f} | '
               + ' | '.join(f'{line["right"][str(n)]:.1%}' for n in asked) + ' | '
               + ', '.join(f'{share:.0%}' for share in each) + ' |')


def recall(runs, plan):
    """Which value belongs to a key, among ever more pairs, by small models, not of one size, that learn
    it in 1,000 steps of 32 texts, of few pairs first; and the bytes of state that a text of the most
    pairs leaves. Of four rates the one with the most right answers, one seed: a model finds how in
    these steps, or does not yet. A guess is one of the values that were read. Of 16 pairs
    and more the hybrid knows what stands in its window."""
    asked = plan.pairs
    best, lines = solved(runs, plan, 'recall', asked, 4 * max(asked), plan.recall_steps, 32)
    chance = [1 / n for n in asked]
    yield from table_of(best, lines, plan.rates, asked, 'right answers, by pairs', chance)
    curves = {f'{model} val': [(n, line['right'][str(n)]) for n in asked] for model, line in best.items()}
    write_picture(os.path.join(plan.pictures, 'recall.svg'), curves, 'pairs')
    yield f'\n![share of right answers, by pairs]({os.path.basename(plan.pictures)}/recall.svg)'


def copying(runs, plan):
    """Copy, induction and selective copy, by the models of `recall`, learned in 1,000 steps of 32 texts, at
    the trained length and beyond, of the best of four rates, one seed; the bytes of state at the
    trained length."""
    for task, T in (('copy', 32), ('induction', 64), ('selective', 64)):
        asked = [T * times for times in plan.copy_times]
        yield f'\n{task}, learned with {T} tokens:\n'
        found = solved(runs, plan, task, asked, T, plan.task_steps, 32)
        chance = [1 / (VOCABULARIES[task] - FIRST)] * len(asked)
        yield from table_of(*found, plan.rates, asked, 'right answers, by length', chance)
