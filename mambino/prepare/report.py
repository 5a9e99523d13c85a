"""What prepare.py says: the closing tables, and a look into a dataset that is there.

    python prepare.py --inspect data/mine      # report.inspect
    python prepare.py my_folder --dry_run      # report.show_plan
"""
import collections
import os
import re
import shutil
import sys
import textwrap

import numpy as np

from mambino.chat import CHATML, visible
from mambino.configurator import fail, shown
from mambino.files import sha256
from mambino.plain import parse_json
from mambino.prepare import tokens
from mambino.prepare.progress import in_words
from mambino.prepare.spool import FORMAT, hash_pair, new_hash, talk_key
from mambino.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# What was left out

def sort_skipped(skipped):
    """Those that were skipped when looking for them, and those when reading them, in an order of
    their own.
    """
    return sorted(skipped, key=lambda entry: (os.fsencode(entry['file']), entry['reason']))


def alike(text):
    """What texts have in common that say the same of different files: numbers, what is quoted and what
    stands in brackets may differ.
    """
    return without_numbers(re.sub(r'"[^"]*"|\([^)]*\)', '()', text))


def without_numbers(text):
    return re.sub(r'(?<![\w-])\d[\d,.]*', '#', text)


def kind_of_reason(reason):
    """The same of a reason, whose names may differ as well."""
    return 'unknown type' if reason.startswith('unknown type') else alike(reason.partition(': ')[0])


def grouped(entries, key):
    """[entries of one key], those with the most first."""
    groups = collections.defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return sorted(groups.values(), key=lambda group: -len(group))


def by_reason(skipped):
    return grouped(skipped, lambda entry: kind_of_reason(entry['reason']))


def reason_of(group, most=500):
    """What the entries of a group say, on one line, and where they differ, how often each:
    'unknown type .jpg (6), .png (3)'. most: characters of what differs.
    """
    counts = collections.Counter(entry['reason'] for entry in group).most_common()
    texts = [text for text, _ in counts]
    if len(set(map(without_numbers, texts))) == 1:
        return texts[0] + (', and the like' if len(texts) > 1 else '')
    before = re.match(r'(.*[ (])?', os.path.commonprefix(texts))[0]
    rest = [text.removeprefix(before)[::-1] for text in texts]
    behind = re.match(r'(.*[ ),;])?', os.path.commonprefix(rest))[0][::-1]
    parts = [f'{text[::-1].removesuffix(behind)} ({n:,})' for text, (_, n) in zip(rest, counts)]
    shown_parts = parts[:1]
    for part in parts[1:]:
        if sum(map(len, shown_parts)) < most:
            shown_parts.append(part)
    dots = ', ...' if len(shown_parts) < len(parts) else ''
    return before + ', '.join(shown_parts) + dots + behind


def reasons(skipped):
    """How often each reason, the most frequent first, on one line."""
    return ', '.join(f'{len(group):,} {reason_of(group)}' for group in by_reason(skipped))


def nothing_readable(inputs, skipped):
    """The message where there is no document at all."""
    why = f' ({reasons(skipped)})' if skipped else ''
    return f'{", ".join(inputs) or "standard library"}: nothing readable{why}'


def show_skipped(skipped):
    """A line for each reason: how many files, and one of them."""
    print(f'skipped {len(skipped):,}:')
    for group in by_reason(skipped):
        also = '' if len(group) == 1 else ', ...'
        show_row(f'{len(group):>9,}  ', f'{reason_of(group)}: {group[0]["file"]}{also}')


def show_row(head, text):
    """A line that is wrapped under its own text; head: what stands before it, no wider than 40."""
    width = max(40, shutil.get_terminal_size((120, 24)).columns - len(head))
    lines = textwrap.wrap(shown(text), width, break_on_hyphens=False, break_long_words=False) or ['']
    for i, line in enumerate(lines):
        print((head if i == 0 else ' ' * len(head)) + line)


def show_plan(sources, skipped):
    """What prepare.py would read, and what not."""
    for source in sources:
        print(f'{source.kind:<9}{source.size:>15,}  {shown(source.path)}')
    for entry in skipped:
        print(shown(f'skip {entry["file"]}: {entry["reason"]}'))
    print(f'\n{"":<9}{"files":>9}{"bytes":>18}')
    for kind in sorted({source.kind for source in sources}):
        sizes = [source.size for source in sources if source.kind == kind]
        print(f'{kind:<9}{len(sizes):>9,}{sum(sizes):>18,}')
    if skipped:
        show_skipped(skipped)
    print('nothing was read or written; without --dry_run, files may still turn out to be binary, '
          'empty or broken')


# -----------------------------------------------------------------------------
# A dataset

def show(folder, meta, tok):
    """The tables at the end of a run, and three windows of the text."""
    print(f'\n{"":<9}{"files":>9}{"documents":>12}{"characters":>16}{"tokens":>16}')
    for kind, n in sorted(meta['kinds'].items(), key=lambda item: -item[1]['tokens']):
        print(f'{shown(kind):<9}{n["files"]:>9,}{n["documents"]:>12,}{n["characters"]:>16,}{n["tokens"]:>16,}')
    print(f'\n{"":<9}{"":>9}{"documents":>12}{"bytes":>16}{"tokens":>16}{"bytes/token":>14}')
    for split, n in meta['splits'].items():
        bytes_per_token = n['bytes'] / max(1, n['tokens'])
        counts = f'{n["documents"]:>12,}{n["bytes"]:>16,}{n["tokens"]:>16,}'
        print(f'{shown(split):<9}{"":>9}{counts}{bytes_per_token:>14.2f}')
    if meta.get('conversations'):
        shares = [f'{percent(n["learned"], n["tokens"])} of {shown(split)}' for split, n in meta['splits'].items()]
        print(f'{meta["conversations"]:,} documents are conversations, of which the answers are learned. '
              f'Of all tokens, {" and ".join(shares)} are learned')
    sizes = {split: n['tokens'] for split, n in meta['splits'].items()}
    share = sizes['val'] / max(1, sum(sizes.values()))
    if not meta['val_fraction'] / 4 < share < meta['val_fraction'] * 2.5:
        print(f'val has {100 * share:.1f}% of the tokens, not {100 * meta["val_fraction"]:g}%: that '
              'happens with few documents, or very unequal ones: cut the large ones into chapters, '
              'or set --val_fraction')
    if meta['copies']:
        print(f'dropped {meta["copies"]:,} exact copies; near copies are left alone')
    if meta.get('decided'):
        show_decided(meta['decided'])
    if meta['skipped']:
        show_skipped(meta['skipped'])
    if meta['notes']:
        show_notes(meta['notes'])
    if meta['suspects']:
        print('most suspicious:')
        for _, path, why in meta['suspects']:
            print(shown(f'  {path}: {why}'))
    show_windows(folder, meta, tok)


def percent(part, whole):
    """'45%'."""
    return f'{100 * part / max(1, whole):.0f}%'


def show_decided(decided, most=30):
    """How the files were read: a line for what was decided of each kind, with a beginning of the text
    that was taken.
    """
    print('\nread as:')
    rows = [(shown(item['kind']), facts_of(item), in_words(item['files'])) for item in decided[:most]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    width = shutil.get_terminal_size((120, 24)).columns
    for item, (kind, facts, files) in zip(decided, rows):
        head = f'{kind:<{widths[0]}}  {facts:<{min(widths[1], 50)}}  {files:>{widths[2]}}  '
        room = max(20, width - len(head) - 2)
        print(f'{head}"{excerpt(item["sample"], min(room, 60))}"')
    if len(decided) > most:
        print(f'and in {len(decided) - most:,} more ways, which meta.json lists')


def facts_of(item):
    """What was decided, in a few words: 'column text, cp1252'."""
    facts = item['facts']
    words = []
    for name, value in facts.items():
        if name == 'columns':
            words.append(f'column{"s" * ("," in value or "+" in value)} {value}')
        elif value != item['kind']:
            words.append(value)
    return shown(', '.join(words))


def excerpt(sample, length):
    """The beginning of a text on one line."""
    line = shown(' '.join(sample.split()))
    return line if len(line) <= length else line[:length - 1] + '…'


def show_notes(notes):
    """A line for notes that say alike: on how many files, the first one as it is."""
    print(f'noted on {in_words(len({entry["file"] for entry in notes}))}:')
    for group in grouped(notes, lambda entry: alike(entry['note'])):
        first = group[0]
        total = ''
        numbers = [re.match(r'(\d[\d,]*) ', entry['note']) for entry in group]
        if len(group) > 1 and all(numbers):
            n = sum(int(number[1].replace(',', '')) for number in numbers)
            total = f'; {n:,} in all'
        also = '' if len(group) == 1 else f' (and {len(group) - 1:,} more{total})'
        show_row(f'{len(group):>9,}  ', f'{first["file"]}: {first["note"]}{also}')


def show_windows(folder, meta, tok, n=3, length=80):
    """A decoded look at random places of the train split, always the same ones."""
    size = meta['splits']['train']['tokens']
    ids = np.memmap(os.path.join(folder, 'train.bin'), '<i4', 'r')
    width = shutil.get_terminal_size((120, 24)).columns - 4
    starts = np.random.default_rng(0).integers(0, max(1, size - length), n).tolist()
    for start in sorted(starts):
        around = max(0, start - 3)
        nearby = visible(np.array(ids[around:start + length + 3]))
        first, last = tok.whole(nearby, start - around, min(size, start + length) - around)
        text = tokens.readable(tok, nearby[first:last], begins=around + first == 0).strip('\n')
        learned = int((ids[start:start + length] >= 0).sum())
        share = f' ({learned} of {min(size - start, length)} are learned)' if meta.get('conversations') else ''
        print(f'\nfrom token {start:,}{share}:')
        for line in text.split('\n')[:8]:
            print('  | ' + ''.join(c if c.isprintable() else ' ' for c in line)[:width - 2])


# -----------------------------------------------------------------------------
# Whether it is sound

def inspect(path):
    """Shows a dataset and checks it: the files against their hashes, the documents against theirs.
    Ends the program, with status 2 and one line, if it is damaged.
    """
    folder = path if os.path.isdir(path) else os.path.join('data', path)
    path_of_meta = os.path.join(folder, 'meta.json')
    try:
        if os.path.exists(path_of_meta) and not os.path.isfile(path_of_meta):
            fail(f'{path}: not a dataset (meta.json is no file); prepare.py makes one')
        with open(path_of_meta, encoding='utf-8') as f:
            meta = parse_json(f.read())
        if meta['format'] != FORMAT:
            fail(f'{path}: made by an older prepare.py, without offsets and hashes; prepare it again')
        wrong, lengths, checked = check(folder, meta)
        if wrong:
            fail(f'{folder}: damaged: {"; ".join(wrong)}; prepare it again')
        tok = load_tokenizer(folder)
        sources = ', '.join(meta['sources'])
        print(shown(f'{folder}: {tok.kind} tokenizer of {tok.vocab_size:,} ids, from {sources}'))
        show(folder, meta, tok)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
            MemoryError) as error:
        why = getattr(error, 'strerror', None) or type(error).__name__
        fail(f'{path}: not a dataset ({why}); prepare.py makes one')
    show_histogram(lengths)
    decoded = f'{checked:,} documents decode to the text that was taken'
    if not checked:
        decoded = "no document was decoded, since another's tokenizer or template may change a text"
    print(f'\nsound: the hashes of {len(meta["sha256"])} files are right, and {decoded}')


def check(folder, meta):
    """(list of what is wrong, lengths of all documents, how many of them were decoded)"""
    wrong = check_files(folder, meta)
    lengths = []
    checked = 0
    if wrong:
        return wrong, lengths, checked
    tok = load_tokenizer(folder)
    for split, n in meta['splits'].items():
        path = os.path.join(folder, split)
        is_small = n['tokens'] < 1000
        ids = np.fromfile(path + '.bin', '<i4') if is_small else np.memmap(path + '.bin', '<i4', 'r')
        offsets = np.fromfile(path + '.idx', '<u8').astype(np.int64)
        hashes = np.fromfile(path + '.hash', '<u8').reshape(-1, 2)
        if len(ids) != n['tokens'] or not len(offsets) == len(hashes) + 1 == n['documents'] + 1:
            wrong.append(f'meta.json does not fit {split}.bin and {split}.idx')
        elif offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
            wrong.append(f'{split}.idx does not fit {split}.bin')
        else:
            lengths.append(np.diff(offsets))
            damaged, decoded = check_documents(meta, tok, ids, offsets, hashes)
            checked += decoded
            if damaged is not None:
                wrong.append(f'document {damaged:,} of {split} does not decode to the text that was taken')
    return wrong, np.concatenate(lengths) if lengths else lengths, checked


def check_files(folder, meta):
    """The files against the hashes in meta.json: list of what is wrong."""
    wrong = []
    for name, expected in meta['sha256'].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            wrong.append(f'{name} is missing')
        elif sha256(path) != expected:
            wrong.append(f'{name} has changed')
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.isfile(path) or sha256(path) != meta['tokenizer']['sha256']:
        wrong.append('tokenizer.json is missing or has changed')
    return wrong


def check_documents(meta, tok, ids, offsets, hashes, most=1000):
    """The documents of a split against their hashes. (the first one that differs or None, how many
    of them were decoded)
    """
    if not tok.gives_back:
        return None, 0
    first = int(meta['halves'])  # half of a document bears the hash of the whole
    template = meta.get('tokenizer_config', {}).get('chat_template')
    documents = range(first, len(hashes))
    if len(documents) > most:
        documents = np.random.default_rng(0).choice(documents, most, replace=False)
    decoded = 0
    for i in documents:
        own = np.array(ids[offsets[i]:offsets[i + 1]])
        if own.min() >= 0:
            state = new_hash(meta['split_seed'], tok.decode(own).encode('utf-8'))
        elif template and template.endswith(CHATML):
            state = new_hash(meta['split_seed'], talk_key(tokens.messages_of(tok, own)))
        else:
            continue  # another's template may change a text
        decoded += 1
        if hash_pair(state) != tuple(hashes[i].tolist()):
            return i, decoded
    return None, decoded


def show_histogram(lengths):
    """Lengths of documents, in powers of two, as bars."""
    median, mean, longest = int(np.median(lengths)), int(lengths.mean()), int(lengths.max())
    print(f'\ntokens in a document: median {median:,}, mean {mean:,}, longest {longest:,}')
    powers = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    width = max(10, shutil.get_terminal_size((100, 24)).columns - 40)
    block = '█' if 'utf' in (sys.stdout.encoding or '').lower() else '#'
    for power in range(int(np.flatnonzero(powers)[0]), len(powers)):
        bar = block * round(width * powers[power] / powers.max())
        print(f'{2 ** power:>12,} .. {2 ** (power + 1) - 1:<12,}{powers[power]:>9,} {bar}')
