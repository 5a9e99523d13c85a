"""From sources to documents: the sources are dealt out to tasks, and those are done in many
processes.

    sources, plans, unusable = extract.look(sources, work, options)
    tasks = extract.make_tasks(sources, plans, work, options, seed=1337, chars=False)
    reports = extract.extract(tasks, work)    # of spool.extract, in the order of the tasks

    source ──► unit: a file, or a part of a large one ──► task: several units, up to TASK_BYTES

What a task is called says all that its result depends on: so a run that goes on finds what an
earlier one has done. The largest are done first, so that none is left to be read alone at the end.
"""
import errno
import functools
import json
import os
from importlib.metadata import PackageNotFoundError, version

from mambino.configurator import fail
from mambino.prepare import pool, spool, survey
from mambino.prepare.documents.pdf_engines import ENGINES
from mambino.prepare.progress import Progress, in_words
from mambino.prepare.sources import Source
from mambino.prepare.tables import hub

# what is read may depend on whether these are installed, and on their versions
PACKAGES = ('pypdfium2', 'pypdf', 'cryptography', 'mammoth', 'python-pptx', 'python-calamine', 'striprtf', 'zstandard')
SLOW = ('pdf', 'docx', 'pptx', 'xlsx', 'epub', 'odt', 'rtf')
TASK_BYTES = 8_000_000  # sources are read in tasks of about so much,
TASK_FILES = 200        # and of at most so many
DISK = {os.strerror(number) for number in errno.errorcode}  # reasons that are not a file's fault


def look(sources, work, options):
    """survey.survey(sources, options), or what it said when it was asked the same before."""
    path = os.path.join(work, 'looked')
    asked = spool.digest([spool.JOURNAL, versions(), [list(source) for source in sources], options])
    answer = answer_to(asked, path)
    if answer is None:
        with Progress('looking', also=f'at {in_words(len(sources))}'):
            answer = survey.survey(sources, options)
        if any('again' in plan for plan in answer[1]):
            asked = ''  # the disk's fault: it may be better next time
        text = json.dumps([asked, answer])
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
        os.replace(path + '.tmp', path)
        answer = json.loads(text)[1]  # as a run that goes on will find it
    usable, plans, unusable = answer
    return [Source(*source) for source in usable], plans, unusable


def answer_to(asked, path):
    """What was found out by an earlier run that asked the same; else None."""
    try:
        with open(path, encoding='utf-8') as f:
            before, answer = json.load(f)
        refused = any(entry['reason'] in DISK for entry in answer[2])  # it may be better now
        return answer if before == asked and not refused else None
    except (OSError, ValueError):
        return None


def make_tasks(sources, plans, work, options, seed, chars):
    """The tasks for spool.extract. plans: of survey.survey, one a source. options:
    text_column, max_file_mb, pdf ('auto', or a key of pdf_text.ENGINES), file_seconds,
    file_memory_mb, document_separator; seed: of the documents' hashes; chars: whether to collect the
    characters.
    """
    engine, other = pdf_engines(options['pdf'])
    options = options | {'pdf': engine, 'pdf_other': other}
    tasks = []
    for source, plan, part, size in units_of(sources, plans):
        more = max(size * 20, 1_000_000) if source.kind in SLOW else size
        is_full = not tasks or tasks[-1]['cost'] + more > TASK_BYTES or len(tasks[-1]['sources']) >= TASK_FILES
        if is_full or source.kind == 'hf':
            tasks.append({
                'folder': work, 'cwd': os.getcwd(), 'seed': seed, 'chars': chars, 'options': options, 'cost': 0,
                'sources': [], 'plans': [], 'parts': [], 'sizes': [],
            })
        task = tasks[-1]
        task['sources'].append(list(source))
        task['plans'].append(plan)
        task['parts'].append(part)
        task['sizes'].append(size)
        task['cost'] += more
    for task in tasks:
        depends_on = [task[name] for name in ('sources', 'plans', 'parts', 'seed', 'chars', 'options')]
        task['key'] = spool.digest([spool.JOURNAL, versions(), depends_on])[:32]
    return tasks


def pdf_engines(wanted):
    """(name of the package that reads PDFs, that of the one that is tried on a page it cannot read
    or ''). One that is asked for by its name reads alone.
    """
    if wanted not in ('auto', *ENGINES):
        fail(f'pdf={wanted}: it is auto, pypdf or pypdfium2')
    names = ['pypdfium2', 'pypdf'] if wanted == 'auto' else [wanted]
    installed = [name for name in names if version_of(name)]
    if not installed:
        fail(f'pdf={wanted}: this package is not installed: pip install {names[-1]}')
    return (*installed, '')[:2]


@functools.cache
def version_of(package):
    """Of an installed package; '' where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ''


def versions():
    """Of all PACKAGES."""
    return [version_of(name) for name in PACKAGES]


def units_of(sources, plans):
    """Yields (source, plan, [number of a part, of how many] or None, bytes): one for each source, or
    one for each of its parts or shards.
    """
    for source, plan in zip(sources, plans):
        name = 'part'
        parts = plan.get('parts')
        if source.kind == 'hf':
            name = 'shard'
            parts = shards_of(source.path)
        if not parts:
            yield source, plan, None, source.size
            continue
        shared = {key: value for key, value in plan.items() if key != 'parts'}
        for i, part in enumerate(parts):
            size = source.size * (i + 1) // len(parts) - source.size * i // len(parts)
            yield source, shared | {name: part}, [i, len(parts)], size


def shards_of(spec):
    """[(number of shards, index)] of a streamed dataset, to be read side by side."""
    n = getattr(hub.or_end(hub.open_hf, spec), 'num_shards', 1)
    return [(n, i) for i in range(n)]


def extract(tasks, work):
    """Does the tasks that the journal has not yet. Returns the reports, in the order of the tasks.
    """
    reports = {task['key']: spool.report_of(work, task['key']) for task in tasks}
    todo = [task for task in tasks if not reports[task['key']] or reports[task['key']]['again']]
    if len(todo) < len(tasks):
        print(f'going on: {len(tasks) - len(todo):,} of {len(tasks):,} parts were read before')
    todo.sort(key=lambda task: -task['cost'])
    total = sum(sum(task['sizes']) for task in todo)
    with Progress('reading', total, lambda: spool.unfinished(work)) as progress:
        for size in pool.map_tasks(spool.extract, todo, window=64, in_order=False):
            progress.add(size)
    for task in todo:
        reports[task['key']] = spool.report_of(work, task['key'])
    return [reports[task['key']] for task in tasks]
