"""Which data a run is trained on, told by its content: a name may come to mean another text, and a
text another name.

    parts = identity_of(data)               # [{'name', 'weight', 'train', 'val'}, …]: what a checkpoint keeps
    changes = differences(then, parts)      # ['the val split of docs']; [] where all is as it was

    .bin ──► sha256, of all of a file, or of a large one what meta.json says ──► checkpoint
                                                                                    │
    the same at a resume ──────────────────────────────────────────► equal? ◄───────┘
"""
import hashlib
import os
import shlex

import numpy as np

from mambino.configurator import fail
from mambino.plain import parse_json
from mambino.train.processes import say
from mambino.train.progress import latest_of

# Bytes of a file that is hashed whole at each start: 0.3 to 1 second, and its ids are looked at anyway.
# Of a larger one counts what meta.json says; without meta.json its size and STRETCHES pieces of
# STRETCH bytes, evenly spread: a second of reading at most, which another text never passes.
WHOLE = 400_000_000
STRETCH = 1 << 16
STRETCHES = 1024


def identity_of(data):
    """[{'name', 'weight', 'train', 'val'}] of each dataset in `data`, the last two hex digests, by
    which it knows its own files again."""
    parts = []
    for part, weight in zip(data.parts, data.weights):
        part.digests = {split: digest(part, split) for split in ('train', 'val')}
        parts.append(dict(name=part.name, weight=float(weight), **part.digests))
    return parts


def digest(part, split):
    """The sha256 of a .bin, or what stands for it. A file that is not the one its meta.json speaks
    of ends the program in a line."""
    told = told_digest(part.meta, split)
    ids = part.read(split)
    if ids.nbytes > WHOLE:
        return told or sampled_digest(ids)
    found = hashlib.sha256(np.ascontiguousarray(ids)).hexdigest()
    if told and found != told:
        fail(f'{part.paths[split]}: not the file that its meta.json speaks of: damaged, or another was put in its '
             f'place; put the right one back, or run prepare.py again')
    return found


def told_digest(meta, split):
    """What meta.json says of a .bin; '' if it says nothing."""
    digests = (meta or {}).get('sha256')
    told = digests.get(f'{split}.bin') if isinstance(digests, dict) else None
    return told if isinstance(told, str) else ''


def sampled_digest(ids):
    """A digest of the size and of evenly spread pieces of a file that is too large to be read."""
    raw = ids.view(np.uint8)
    state = hashlib.sha256(str(raw.size).encode())
    for start in np.linspace(0, raw.size - STRETCH, STRETCHES).astype(np.int64):
        state.update(np.ascontiguousarray(raw[start:start + STRETCH]))
    return 'pieces ' + state.hexdigest()


def contents(parts):
    """The parts without their names, in an order of their own: equal for equal data."""
    return sorted((part['train'], part['val'], round(part['weight'], 6)) for part in parts)


def differences(then, now):
    """What of the data is not as it was, in words; [] where at most names are others."""
    if contents(then) == contents(now):
        return []
    if [part['name'] for part in then] != [part['name'] for part in now]:
        texts = [sorted((part['train'], part['val']) for part in parts) for parts in (then, now)]
        return ['the weights of the mixture' if texts[0] == texts[1] else 'the text']
    changed = []
    for old, new in zip(then, now):
        splits = [split for split in ('train', 'val') if old[split] != new[split]]
        if splits:
            whole = len(splits) == 2
            changed.append(f'the text of {new["name"]}' if whole else f'the {splits[0]} split of {new["name"]}')
        elif abs(old['weight'] - new['weight']) > 1e-6:
            changed.append(f'the weight of {new["name"]}')
    return changed or ['the text']


def known_parts(ckpt):
    """What a checkpoint says of its data, as identity_of gives it; None where it says nothing."""
    try:
        parts = ckpt['data']['parts']
        contents(parts)
        return parts
    except (KeyError, TypeError, AttributeError):
        return None


def same_text(parts, root='data'):
    """The name of a dataset in data/ with the content that a run of one dataset had, whatever it is
    called now; None if there is none."""
    for name in sorted(os.listdir(root)) if parts and len(parts) == 1 and os.path.isdir(root) else []:
        try:
            with open(os.path.join(root, name, 'meta.json'), encoding='utf-8') as f:
                meta = parse_json(f.read())
            if all(told_digest(meta, split) == parts[0][split] for split in ('train', 'val')):
                return name
        except (OSError, ValueError, AttributeError):
            continue
    return None


def require_same_text(ckpt, data, settings, is_named):
    """Ends the program if a run would go on with other text than before, and nobody said so. ckpt:
    of the run. settings: all of train.py's. is_named: whether the command line names the
    dataset."""
    out_dir, latest = settings['out_dir'], latest_of(settings['out_dir'])
    name, old_name = data.name, ckpt['settings']['dataset']
    known = known_parts(ckpt)
    if known is None:
        changes = ['the text'] * (name != old_name)
        if not changes:
            say(f'note: the checkpoint in {out_dir} does not say by its content which text it was trained on: it is '
                f'taken to be that of {name}')
    else:
        changes = differences(known, data.identity)
    if not changes:
        return
    if settings['eval_only'] or (settings['init_from'] == 'resume' and is_named):
        say(f'note: {latest} was trained on other data than {name} holds now ({", ".join(changes)})')
        return
    apart = 'choose another --out_dir'
    if not settings['adapter']:
        apart += ', or begin anew with --init_from=scratch'
    command = f'--init_from=resume {shlex.quote(f"--dataset={name}")}'
    if name != old_name:
        fail(f'{latest} holds a run with dataset={old_name}, not {name}: leave the setting out to go on with it; to '
             f'go on with the other text say {command}; or {apart}')
    fail(f'{latest}: the data of this run has changed since ({", ".join(changes)}): to go on with what it is now say '
         f'{command}; else put the old data back, or {apart}')


# --- what a run's losses were measured on ----------------------------------------------------------

def record(data, settings):
    """What a checkpoint keeps of its data: its parts, and what of them an evaluation reads."""
    T, most = settings['block_size'], settings['eval_iters']
    parts = []
    for part, known in zip(data.parts, data.identity):
        rows = -(-(part.tokens['val'] - 1) // T)
        parts.append(known | dict(sequences=min(rows, most or rows)))
    return dict(parts=parts, block_size=T)


def measure_changes(ckpt, now):
    """Why the losses of a checkpoint cannot be compared with those to come, in words; [] if they
    can. now: as `record` gives it."""
    then = ckpt.get('data')
    parts = known_parts(ckpt)
    if parts is None:           # of an older version, which counted batches
        settings = ckpt['settings']
        most = settings.get('eval_iters', 0) * max(1, settings.get('batch_size', 1))
        then = dict(block_size=ckpt['config']['block_size'])
        sequences = [min(part['sequences'], most or part['sequences']) for part in now['parts']]
        changes = []
    else:
        sequences = [part.get('sequences') for part in parts]
        changes = differences(parts, now['parts'])
    if not changes and sorted(sequences, key=str) != sorted((part['sequences'] for part in now['parts']), key=str):
        changes.append('eval_iters')
    if then.get('block_size') != now['block_size']:
        changes.append('block_size')
    return changes
