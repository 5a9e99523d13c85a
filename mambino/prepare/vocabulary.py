"""The tokenizer of a dataset: one that is there already, or one that is trained on a sample of the
documents.

    fixed = vocabulary.fixed_tokenizer('gpt2', vocab_size=0)    # None for char and bpe
    tok = vocabulary.make_tokenizer(fixed, ...)                 # in <work>/tokenizer
"""
import os
import time

from mambino.chat import encode_chat
from mambino.prepare import pool, spool
from mambino.prepare.progress import Progress
from mambino.tokenizer import FILE, build_tokenizer, load_tokenizer

TRAINED = ('char', 'bpe')
STAMP = os.path.join('tokenizer', 'made_of')  # in the workplace: what the tokenizer there was made of


def fixed_tokenizer(kind, vocab_size):
    """The tokenizer of this kind where it needs no texts; else None. Ends the program where it
    cannot be had, or made.
    """
    if kind not in TRAINED:
        return build_tokenizer(kind)
    build_tokenizer(kind, [], vocab_size)  # refuses a vocab_size that is too small, now
    return None


def why_no_talks(tok, kind):
    """Why conversations cannot be written with a tokenizer, or one of this kind that is still to be made
    where tok is None; '' where they can."""
    if tok is None:
        return 'a char tokenizer has no marks around messages; --tokenizer=bpe has' if kind == 'char' else ''
    try:
        encode_chat(tok, [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}])
        return ''
    except ValueError as error:
        return str(error)


def make_tokenizer(fixed, kind, vocab_size, sample_mb, split_seed, corpus, chars, work):
    """The tokenizer, in `work`/tokenizer: `fixed`, or if that is None one of this kind that is
    built now, unless a run before this one did that. chars: the set of all characters, for kind 'char'.
    """
    folder = os.path.join(work, 'tokenizer')
    stamp = os.path.join(work, STAMP)
    if fixed:
        made_of = fixed.sha256()
    else:
        made_of = spool.digest([kind, vocab_size, sample_mb, split_seed, corpus.decision()])
    if read_text(stamp) == made_of and os.path.exists(os.path.join(folder, FILE)):
        return fixed or load_tokenizer(folder)
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(stamp):
        os.remove(stamp)
    began = time.time()
    if fixed:
        fixed.save(folder)
    elif kind == 'char':
        build_tokenizer('char', [''.join(sorted(chars))]).save(folder)
    else:
        sample = list(corpus.sample(sample_mb))
        task = {'work': work, 'folder': folder, 'sample': sample, 'vocab_size': vocab_size}
        size = sum(int(rows['size'].sum()) for _, _, rows, _ in sample)
        with Progress('tokenizer', also=f'is trained on {size / 1e6:,.1f} MB'):
            if pool.processes() == 1 or len(sample) < 20:
                train_bpe(task)
            else:
                pool.apart(train_bpe, task)
    tok = fixed or load_tokenizer(folder)
    with open(stamp, 'w', encoding='utf-8') as f:
        f.write(made_of)
    if not fixed:
        print(f'tokenizer {tok.vocab_size:9,} ids{"":<26}in {time.time() - began:.1f} s')
    return tok


def read_text(path):
    """What is in a file; '' where it is not there."""
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8') as f:
        return f.read()


def train_bpe(task):
    """Trains it on the sample: {'work', 'folder', 'sample', 'vocab_size'}."""
    def texts():
        for key, block, rows, last_chars in task['sample']:
            data = spool.read_block(task['work'], key, block)
            yield from (text for text, _ in spool.texts_of(data, rows, last_chars, roles=True))

    build_tokenizer('bpe', texts(), task['vocab_size']).save(task['folder'])
