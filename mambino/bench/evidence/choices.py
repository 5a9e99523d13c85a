"""What each choice of the recipes is worth: a run with one thing changed, beside the run without."""
import re
import statistics

from mambino.bench.evidence.losses import MODELS, flags_of, rate_of

CHANGES = {     # what is changed: the models it means something to, flags
    'AdamW at 4e-3': ([*MODELS], '--optimizer=adamw --learning_rate=4e-3'),
    'AdamW at 1e-3': ([*MODELS], '--optimizer=adamw --learning_rate=1e-3'),
    'a cosine': ([*MODELS], '--schedule=cosine'),
    'decay of all steps': ([*MODELS], '--decay_fraction=1.0'),
    'no weight decay': ([*MODELS], '--weight_decay=0'),
    'steps of 2,048 tokens, twice as many': ([*MODELS], '--tokens_per_step=2048 --batch_size=16 --max_iters={twice}'),
    'windows of 256': ([*MODELS], '--block_size=256 --batch_size=16'),
    'windows of 64': ([*MODELS], '--block_size=64 --batch_size=64'),
    'no tied embedding': ([*MODELS], '--tie_embeddings=False'),
    'no QK-norm': (['GPT', 'hybrid'], '--qk_norm=False'),
    'rope_theta 1,000': (['GPT', 'hybrid'], '--rope_theta=1000'),
    'half the key heads': (['GPT'], '--n_kv_head=1'),
    'a state of 32': (['Mamba-2'], '--state_size=32'),
    'a state of 64': (['Mamba-2'], '--state_size=64'),
    'two groups': (['Mamba-2'], '--n_groups=2'),
    'Mamba-3': (['Mamba-2'], '--version=3'),
    'no gate': (['hybrid'], '--gate=False'),
    'no branch norm': (['hybrid'], '--branch_norm=False'),
    'parallel': (['hybrid'], '--layout=parallel'),
    'Mamba and attention by turns': (['hybrid'], '--layers=ma')}


def changed(flags, change):
    """Flags with some of them replaced."""
    new = change.split()
    names = {flag.partition('=')[0] for flag in new}
    return [flag for flag in flags if flag.partition('=')[0] not in names] + new


def choices(runs, plan):
    """Val loss with one thing changed, at equal tokens: what the change adds, and the time it takes, one seed each.
    Beside it what other seeds add."""
    corpus = plan.corpora[0]
    more = f'--dataset={corpus} --eval_interval={plan.steps}'
    base = {model: flags_of(model, more, plan, 1, rate_of(runs, plan, model)) for model in MODELS}
    wanted = {f'choice {model}': flags for model, flags in base.items()}
    for seed in (2, 3):
        wanted |= {f'choice {model}, seed {seed}': changed(base[model], f'--seed={seed}') for model in MODELS}
    for name, (models, change) in plan.changes.items():
        change = change.format(twice=2 * plan.steps)
        wanted |= {f'choice {model}, {name}': changed(base[model], change) for model in models}
    ended = runs.train(wanted)
    yield '| val loss, the change; time | ' + ' | '.join(MODELS) + ' |\n| --- |' + ' --- |' * len(MODELS)
    losses = [ended[f'choice {model}']['val_loss'] for model in MODELS]
    yield '| as in the other sections | ' + ' | '.join(f'{loss:.3f}' for loss in losses) + ' |'
    spread = [statistics.stdev(ended[name]['val_loss'] for name in wanted
                               if re.fullmatch(rf'choice {re.escape(model)}(, seed \d)?', name)) for model in MODELS]
    yield '| other seeds, standard deviation | ' + ' | '.join(f'{sd:.3f}' for sd in spread) + ' |'
    for name, (models, _) in plan.changes.items():
        cells = []
        for model in MODELS:
            if model not in models:
                cells.append('')
                continue
            line, old = ended[f'choice {model}, {name}'], ended[f'choice {model}']
            cells.append(f'{line["val_loss"] - old["val_loss"]:+.3f}; {line["seconds"] / old["seconds"]:.2f}x')
        yield f'| {name} | ' + ' | '.join(cells) + ' |'


def samples(runs, plan):
    """The first sample of each model at seed 1337, as sample.py gives it."""
    for model in MODELS:
        name = f'{plan.corpora[0]} {model} {plan.seeds[0]}'
        words = [f'--out_dir={runs.path(name).rpartition("/")[2]}', '--max_new_tokens=300', '--device=cpu']
        said = re.sub(r'\A(?:\w+ += .*\n)+', '', runs.script('sample.py', words).stdout)
        yield f'\n{model}:\n\n```\n{said.strip()}\n```'
