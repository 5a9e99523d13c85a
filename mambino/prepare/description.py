"""meta.json: what a dataset is, and what became of the files that it was made of.

    meta = description.describe(inputs, base, tok, corpus, account, skipped, written, 1337, 0.1)
"""
import collections
import hashlib
import json
import platform

from mambino.chat import template_of, trouble
from mambino.prepare import screen, spool
from mambino.prepare.spool import FORMAT


def describe(inputs, base, tok, corpus, account, skipped, written, split_seed, val_fraction):
    """meta.json: nothing in it says when, where or by how many it was made. account: of
    account.settle.
    """
    config = dict(tok.config)
    if written.talks:
        config.setdefault('chat_template', template_of(tok))
    sources = sorted(set(inputs)) or [f'Python {platform.python_version()} standard library']
    return {
        'format': FORMAT, 'dtype': 'int32', 'vocab_size': tok.vocab_size, 'eot': tok.eot,
        **({'bos': tok.bos} if tok.bos else {}),
        **({'tokenizer_config': config} if config else {}),
        **({'conversations': written.talks} if written.talks else {}),
        'tokenizer': {'kind': tok.kind, 'file': 'tokenizer.json', 'sha256': tok.sha256()},
        'splits': written.splits, 'split_seed': split_seed, 'val_fraction': val_fraction,
        # a document whose hash is below is val; null: split by position
        'split_limit': f'{corpus.limit:016x}' if corpus.limit else None,
        # the first document of each split is half of one
        'halves': not corpus.limit or base.get('halves', False),
        'sources': base.get('sources', []) + sources,
        'kinds': count_kinds(base, corpus, account, written),
        'decided': base.get('decided', []) + decided(account),
        'copies': base.get('copies', 0) + corpus.copies,
        'suspects': screen.worst(account['suspects'] + base.get('suspects', [])),
        'sha256': written.sha256,
        # the same for the same data, whatever it is called
        'content': content_of(written.sha256, tok.sha256()),
        'notes': base.get('notes', []) + account['notes'] + notes_of(written, tok),
        'skipped': base.get('skipped', []) + skipped,
    }


def notes_of(written, tok):
    """What the tokenizer's template did not take as it was, or does to conversations, [{'file',
    'note'}]."""
    notes = trouble(tok) if written.talks else []
    if written.mended:
        notes.append(f'{written.mended:,} conversations have what the system says before their first question, for the '
                     'chat template of the tokenizer takes no system message')
    for why, n in sorted(collections.Counter(why for _, _, why in written.refused).items()):
        notes.append(f'{n:,} conversations were left out, refused by the chat template of the tokenizer: {why}')
    return [{'file': 'tokenizer.json', 'note': note} for note in notes]


def content_of(sha256, tokenizer):
    """What a dataset is known by: the sha256 of those of its files and of its tokenizer."""
    lines = [f'{name} {sha256[name]}\n' for name in sorted(sha256)]
    return hashlib.sha256(''.join([*lines, f'tokenizer {tokenizer}\n']).encode()).hexdigest()


def decided(account):
    """[{'kind', 'facts', 'files', 'sample'}]: how the files were read, by kind, the most frequent
    first.
    """
    items = []
    for decision, (files, sample) in account['decided'].items():
        kind, facts = json.loads(decision)
        items.append({'kind': kind, 'facts': facts, 'files': files, 'sample': sample})
    return sorted(items, key=lambda item: (spool.KINDS.index(item['kind']), -item['files']))


def count_kinds(base, corpus, account, written):
    """{kind: {'files', 'documents', 'characters', 'tokens'}} of the kinds that occur."""
    columns = ('files', 'documents', 'characters', 'tokens')
    table = {kind: dict.fromkeys(columns, 0) for kind in spool.KINDS}

    def add(counts):
        for kind, more in counts.items():
            for name, n in more.items():
                table[kind][name] += n

    add(base.get('kinds', {}))
    add(corpus.totals())
    for kind, characters, _ in written.refused:
        add({spool.KINDS[kind]: {'documents': -1, 'characters': -characters}})
    add({kind: {'tokens': n} for kind, n in zip(spool.KINDS, written.kinds)})
    add({kind: {'files': n} for kind, n in account['files'].items()})
    return {kind: counts for kind, counts in table.items() if any(counts.values())}
