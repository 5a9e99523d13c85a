"""Turns whatever you have into a dataset: token ids for training and validation, and the tokenizer
that made them.

    python prepare.py                                       # Python's own standard library
    python prepare.py my_folder notes.txt --out=data/mine   # text, code, PDF, parquet, ...
    python prepare.py --inspect data/mine                   # what is in a dataset; is it sound?

    find         sources.py      files, folders and patterns ──► sources, in an order of their own
    look         survey.py       tables: which column has the text? large ones are cut into parts
    extract      readers.py      sources ──► documents: clean text, on disk; in many processes
    judge        account.py      what each file gave and lost: too much lost, and it is left out
    decide       corpus.py       copies are dropped; train or val
    tokenizer    vocabulary.py   a given one, tried on a sample (trial.py), or one trained on it
    encode       output.py       documents ──► ids (tokens.py); in many processes
    publish      output.py       <out>/{train,val}.bin, .idx, .hash, meta.json (description.py), tokenizer.json

A document goes to train or val by a hash of its content, so the split survives reordering and
reruns, and copies stay on one side; one that alone is more than val_fraction of the whole goes to
train. Each is closed by the end-of-text id. A corpus of one document is split by position instead,
its last val_fraction being val, and gets no end-of-text. Ids are flat little-endian int32; one that is
read and not to be learned, as a question before its answer, is stored as -1 - id.
    .idx   uint64: where the documents begin in the .bin, and at last where it ends
    .hash  16 bytes a document: the hash of its text

All of it happens in <out>.partial, which also is the journal: what a stopped or killed run has done
there, the same command does not do again. The finished folder takes the place of `out` by a rename.
What is in it depends on the files and the settings alone: not on the number of processes, the order
of the arguments, or how often the run was interrupted.
"""
import os
import shlex

from mambino.configurator import configure, fail, require, shown, typed
from mambino.console import end_quietly, go_on_without_stdout

# files, folders, 'patterns/**/*.md', hf:name; none: the Python standard library, 10 MB of good code
inputs = []
# --- dataset ---
out = ''              # where to write; '' is data/<name of the first input>
append = False        # add to the dataset in `out`, with its tokenizer, instead of replacing it
dry_run = False       # only list what would be taken and what not
inspect = False       # the inputs are datasets: show and check them
# --- what is taken ---
exclude = ''          # what else to leave out of folders, as in a .gitignore: 'build/,*.log'; '!*.svg'
                      # has back what JUNK and SECRETS in sources.py leave out
gitignore = True      # leave out what .gitignore files in the folders name
max_file_mb = 256.0   # larger files found in folders are skipped, most are dumps; tables and files
                      # you name are not (packed ones are, if they hold more)
text_column = ''      # of tables: text, or several as question,answer, or one within as meta.body; * is
                      # whole rows, as JSON; '' is found by what is in the columns
conversations = 'auto'  # rows and texts that are conversations, or a question and its answer, become messages:
                      # the answers are learned, all else is read; true: the columns of --text_column too,
                      # the last is the answer; false: they are plain text
encoding = ''         # of texts and tables, where you know it: gbk, cp1251, ...; '' is found out
document_separator = ''  # what stands between the documents in one text file, say <|endoftext|>; \n is
                      # a newline
dedupe = True         # drop documents that are exactly like an earlier one; near copies stay
pdf = 'auto'          # pypdf; or pypdfium2, faster, a package of its own; auto: that when installed,
                      # and pypdf for the pages that it cannot read
file_seconds = 60.0   # of computing that a PDF or an HTML page may take; for a PDF half a second
                      # more with each page
file_memory_mb = 1024.0  # that it may need (Linux)
unpack_ratio = 200.0  # a packed file (gz, zip, docx, parquet, ...) may hold so many times its size, and
                      # 100 MB in any case: what holds more is a bomb
# --- tokens ---
tokenizer = 'bpe'     # char, byte, bpe (trained on these texts), gpt2, or a path to tokenizer.json
vocab_size = 4096     # of a bpe trained here, at most: small, for the embedding of a small model is
                      # most of its weights
sample_mb = 100.0     # a bpe is trained on about so much, taken evenly from the train documents; its
                      # memory grows with it
# --- split ---
val_fraction = 0.1    # share of documents (or of the one document) for validation, between 0 and 1
split_seed = 1337     # another seed is another split
# --- machine ---
workers = 0           # processes; 0 is one for each core
engine = 'local'      # or ray: the same work on a Ray cluster with a shared file system; without a
                      # cluster, on this machine
# -----------------------------------------------------------------------------

if __name__ == '__main__':  # not in the worker processes, which import this file
    # read before the libraries are there: a typo is told at once
    end_quietly()
    explicit = configure(globals(), positional='inputs')

from mambino.prepare import description, extract, output, pool, report, screen, sources, stdlib, unused, vocabulary
from mambino.prepare.account import settle
from mambino.prepare.corpus import Corpus, TooLittle
from mambino.prepare.tables import talks
from mambino.prepare.texts import declared
from mambino.prepare.trial import try_tokenizer


def main():
    require(globals(), {
        'between 0 and 1': dict(val_fraction=0 < val_fraction < 1),
        'between -2**63 and 2**63': dict(split_seed=abs(split_seed) < 2 ** 63),
        'above 0': dict(
            sample_mb=sample_mb > 0, file_seconds=file_seconds > 0, file_memory_mb=file_memory_mb > 0,
            unpack_ratio=unpack_ratio > 0),
        '0 or more': dict(max_file_mb=max_file_mb >= 0),
        '0, or the number of processes': dict(workers=0 <= workers < 1000),
        'auto, true or false': dict(conversations=conversations.lower() in talks.MODES),
        'local or ray': dict(engine=engine in pool.ENGINES)})
    declared.check_encoding(encoding)
    for line in unused.settings(explicit, inputs, tokenizer, append):
        print(line)
    if inspect:
        for path in inputs or fail('--inspect: name a dataset: python prepare.py --inspect data/mine'):
            report.inspect(path)
        return

    target = out or os.path.join('data', output.name_of(inputs))
    folder = os.path.realpath(target)
    separator = screen.separator_of(document_separator)

    # find
    if inputs:
        files, skipped = sources.find(inputs, exclude, gitignore, max_file_mb)
    else:
        files, skipped = stdlib.find_stdlib()
    if unused.excludes_nothing(exclude, skipped):
        print(unused.said('exclude', 'nothing in the folders that are read is called so'))
    skipped = [entry for entry in skipped if not output.is_own(entry['file'], folder)]
    if dry_run:
        report.show_plan(files, skipped)
        return
    output.check_free(folder, target)
    pool.begin(engine, workers)
    go_on_without_stdout()  # the dataset is worth more than what is said of it

    with output.workplace(folder, target, tokenizer) as work:
        if append:  # the settings of what is there hold
            base, fixed_tokenizer = output.open_base(folder, target, explicit)
        else:
            base, fixed_tokenizer = {}, vocabulary.fixed_tokenizer(tokenizer, vocab_size)
        seed = base.get('split_seed', split_seed)
        fraction = base.get('val_fraction', val_fraction)

        # look
        why_no_talks = vocabulary.why_no_talks(fixed_tokenizer, tokenizer)
        mode = talks.mode_of(conversations, why_no_talks)
        options = {'text_column': text_column, 'encoding': encoding, 'max_file_mb': max_file_mb, 'pdf': pdf,
                   'file_seconds': file_seconds, 'file_memory_mb': file_memory_mb,
                   'unpack_ratio': unpack_ratio, 'dedupe': dedupe, 'document_separator': separator,
                   'conversations': mode}
        files, plans, unusable = extract.look(files, work, options)

        # extract
        tasks = extract.make_tasks(files, plans, work, options, seed, chars=tokenizer == 'char')
        reports = extract.extract(tasks, work)

        # judge
        total = settle(tasks, reports)
        skipped = report.sort_skipped(skipped + unusable + total['skipped'])
        if separator and not total['separators']:
            fail(f'document_separator={document_separator}: it is in none of the texts; leave it out')

        # decide
        corpus = Corpus(tasks, reports, total['dropped'], work)
        if not len(corpus.rows):
            raise TooLittle(report.nothing_readable(inputs, skipped))
        corpus.decide(fraction, dedupe, total['copies'], **output.decided_before(base))
        if mode == talks.ALWAYS and not corpus.talks():
            fail(f'conversations={conversations}: there are none; say which columns with --text_column=question,answer')
        if 'split_seed' in explicit and not corpus.limit:
            print(unused.said('split_seed', 'one document is split by position'))
        if not corpus.use.any():
            print(shown(f'nothing new: all {corpus.copies:,} documents are in {target} already'))
            return

        # tokenizer
        tok = vocabulary.make_tokenizer(
            fixed_tokenizer, tokenizer, vocab_size, sample_mb, seed, corpus, total['chars'], work)
        name = tok.kind if append else tokenizer
        total['notes'] += try_tokenizer(tok, name, corpus, work, total, why_no_talks)

        # encode
        written = output.encode(corpus, tok, work, base)

        # publish
        meta = description.describe(inputs, base, tok, corpus, total, skipped, written, seed, fraction)
        output.publish(work, folder, meta, tok)

    report.show(folder, meta, tok)
    dataset = os.path.relpath(folder, os.path.realpath('data'))
    if dataset.startswith('..'):
        dataset = target
    print(typed(f'\nnow: python train.py {shown(shlex.quote(f"--dataset={dataset}"))}'))


if __name__ == '__main__':
    pool.run_program(main)
