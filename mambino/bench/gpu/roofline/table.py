"""python -m mambino.bench.gpu --model: the roofline's tables, without a card."""
import json
import os

from mambino.bench.gpu.roofline import account, cards

GOALS = {'gpt': 0.55, 'mamba': 0.35}        # MFU, compiled
NAMES = {'gpt': 'GPT 270M (20 x 1024)', 'mamba': 'Mamba-2 150M (36 x 768)'}
NOTE = f"""A model, not a measurement. Each kernel takes the larger of its bytes at
{cards.OF_BANDWIDTH:.0%} of the bandwidth and its FLOPs at {cards.OF_PRODUCTS:.0%} of the tensor cores' peak;
attention and scans at a lower share of it, measured on an H100, derived for the others
(roofline/cards.py). Eager: the operations that PyTorch launches. Compiled: the graphs that torch.compile
makes, fused by an estimate of Inductor's rules (roofline/fusion.py). In brackets: bytes and launches of
a micro-step. Beside an H100 a GPT's time was right to 5%, a Mamba-2 took 15 to 40% longer.
Bold: what is wanted, MFU {GOALS['gpt']:.0%} of the GPT and {GOALS['mamba']:.0%} of the Mamba-2."""


def rows_of(kind, measures):
    """[(label, measures)]: eager, then one measure after another; then all without each."""
    of_another = 'triton' if kind == 'gpt' else 'merged'    # a Mamba-2 has no such products
    wanted = [name for name in account.MEASURES if name in measures and name != of_another]
    rows = [('eager', ())]
    for i, name in enumerate(wanted):
        rows.append((f'+ {account.MEASURES[name]}', tuple(wanted[:i + 1])))
    rows += [(f'all without {account.MEASURES[name]}',
              tuple(w for w in wanted if w != name)) for name in wanted[:-1]]
    return rows


def show(out_dir, kinds=('gpt', 'mamba'), measures=tuple(account.MEASURES)):
    """Prints the tables and writes them to out_dir/model.json and model.md."""
    lines, data = [], []
    print(NOTE, flush=True)
    for kind in kinds:
        goal = GOALS[kind]
        head = [f'{NAMES[kind]}, T 1,024, bf16',
                *(f'{card.name}: ms, MFU, tokens/s' for card in cards.CARDS)]
        for text in ('', '| ' + ' | '.join(head) + ' |', '| --- ' * len(head) + '|'):
            print(text, flush=True)
            lines.append(text)
        for label, chosen in rows_of(kind, measures):
            cells = []
            for card in cards.CARDS:
                step = account.step_of(kind, card, chosen)
                data.append(dict(vars(step), model=kind, card=card.name, measures=chosen))
                mfu = f'**{step.mfu:.1%}**' if step.mfu >= goal else f'{step.mfu:.1%}'
                cells.append(f'{step.micro * 1e3:,.0f}, {mfu}, {step.tokens_per_second:,.0f} '
                             f'({step.bytes / 1e9:.0f} GB, {step.launches:,})')
            lines.append('| ' + ' | '.join([label, *cells]) + ' |')
            print(lines[-1], flush=True)
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, 'model.json'), 'w', encoding='utf-8') as f:
        json.dump(data, f, indent=1)
    with open(os.path.join(out_dir, 'model.md'), 'w', encoding='utf-8') as f:
        f.write('\n'.join([NOTE, *lines, '']))
