"""The README.md of an exported folder: what the model is, how it is opened, how it was made, how
good it is.

    text = card(name, net, ckpt, openings, checks)

`openings` and `checks` have the folder's formats as keys: the lines that open each, and what
`verify` found of it, or None.
"""
import os

from mambino.blocks import fills_holes
from mambino.export.folders import name_of

# settings to show
OF_TRAINING = ('optimizer', 'learning_rate', 'schedule', 'tokens_per_step', 'block_size', 'dropout',
               'dtype', 'seed')


def card(name, net, ckpt, openings, checks):
    """The text for a folder of this name. ckpt: the checkpoint that net, the model in it, was made
    of."""
    c = ckpt['config']
    is_trained = ckpt['metadata']['step'] > 0                                   # else it came from elsewhere
    lines = []
    has_holes = fills_holes(c)
    if 'hf' in openings:                                                        # what the hub reads
        # that of fill-mask looks for a mask in a text, which this tokenizer takes for text
        tag = [] if has_holes else ['pipeline_tag: text-generation']
        lines += ['---', 'library_name: transformers', *tag, '---']
    lines += [f'# {name}', '']
    kind = f'Mamba-{c.get("version", 2)}' if ckpt['kind'] == 'mamba' else ckpt['kind']
    origin = 'as it came from elsewhere, written by Mambino'
    if is_trained:
        origin = f'trained on windows of {c["block_size"]} tokens with Mambino'
    lines += [f'A {kind} language model of {net.num_params() / 1e6:.1f}M parameters: '
              f'{c["n_layer"]} layers of width {c["n_embd"]}, a vocabulary of {c["vocab_size"]}, {origin}.', '']
    if ckpt.get('adapter'):
        base = os.path.basename(name_of(ckpt['adapter']['base']))
        merged = '' if 'peft' in openings else ', merged into its weights'
        lines += [f'It is a {ckpt["adapter"]["type"]} adapter on `{base}`{merged}.', '']
    if has_holes:
        where = f'blocks of {c["block_length"]} tokens, one after another' if c['block_length'] else 'a window'
        lines += ['It does not go on from token to token: it fills holes, tokens that are hidden (masked diffusion), '
                  f'in {where}. The last id, {c["vocab_size"] - 1}, stands for a hole; no text has it.', '']
    lines += ['## How to open it', '']
    for format_name, opening in openings.items():
        language = 'sh' if opening.startswith('python ') else 'python'
        lines += [f'{format_name}:', '', f'```{language}', opening, '```', '']
    if is_trained:
        lines += ['## Training', '', *training(ckpt), '']
        said = 'On the val split, by steps' + ('; these are upper bounds:' if has_holes else ':')
        lines += ['## Evaluation', '', said, '', *evaluation(ckpt), '']
    results = [f'- {format_name}: {summary(check)}' for format_name, check in checks.items()]
    lines += ['## Checks', '', *results, '']
    return '\n'.join(lines)


def training(ckpt):
    """The rows of a table: data, settings, sizes."""
    settings, metadata = ckpt['settings'], ckpt['metadata']
    datasets = [os.path.basename(os.path.normpath(part)) for part in settings['dataset'].split(',')]
    rows = {'data': ', '.join(datasets),
            'steps': f'{metadata["step"]:,}',
            'tokens': f'{metadata["tokens_seen"]:,}',
            'time': f'{metadata["seconds"] / 60:,.1f} minutes on {metadata["device"]}'}
    rows |= {key: settings[key] for key in OF_TRAINING}
    sizes = ((key, value) for key, value in sorted(ckpt['config'].items())
             if key not in ('block_size', 'dropout'))                           # settings have those
    lines = [f'| {key} | {value} |' for key, value in (*rows.items(), *sizes)]
    return ['| what | value |', '| --- | --- |', *lines]


def evaluation(ckpt):
    """The rows of a table: the last evaluations."""
    rows = ['| step | val loss | perplexity | bits per byte |', '| --- | --- | --- | --- |']
    for record in ckpt['metadata']['recent']:
        values = [record['val_loss'], record.get('perplexity'), record.get('bits_per_byte')]
        numbers = ' | '.join('n/a' if value is None else f'{value:.4f}' for value in values)
        rows.append(f'| {record["step"]} | {numbers} |')
    return rows


def summary(check):
    """A check, as `verify` returns it, in a line."""
    if check is None:
        return 'not checked'
    parts = [check['tool']]
    if check.get('logits') is not None:
        limit = f' (limit {check["limit"]:.0e})' if check.get('limit') else ''
        parts.append(f'logits within {check["logits"]:.1e}{limit}')
    if check.get('greedy'):
        parts.append(f'greedy tokens {check["greedy"]}')
    if check.get('ids'):
        parts.append(f'texts with equal ids {check["ids"]}')
    line = ', '.join(parts)
    return f'{line}; {check["note"]}' if check.get('note') else line
