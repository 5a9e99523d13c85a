"""From sources to documents: the sources are dealt out to tasks, and those are done in many
processes.

    tasks = extract.make_tasks(sources, plans, work, options, seed=1337, chars=False)
    reports = extract.extract(tasks, work)    # of spool.extract, in the order of the tasks

What a task is called says all that its result depends on: so a run that goes on finds what an
earlier one has done.
"""
import os
from importlib.metadata import PackageNotFoundError, version

from mambino.configurator import fail
from mambino.prepare import hub, pool, report, spool
from mambino.prepare.pdf_engines import ENGINES
from mambino.prepare.sources import Source

# what is read may depend on whether these are installed, and on their versions
PACKAGES = ('pypdfium2', 'pypdf', 'cryptography', 'mammoth', 'python-pptx', 'openpyxl', 'striprtf')
TASK_BYTES = 8_000_000  # sources are read in tasks of about so much,
TASK_FILES = 200        # and of at most so many


def make_tasks(sources, plans, work, options, seed, chars):
    """The tasks for spool.extract. plans: of survey.survey, one a source. options:
    text_column, max_file_mb, pdf ('auto', or a key of pdf_text.ENGINES), file_seconds,
    file_memory_mb; seed: of the documents' hashes; chars: whether to collect the characters.
    """
    engine, other = pdf_engines(options['pdf'])
    options = options | {'pdf': engine, 'pdf_other': other}
    tasks = []
    cost = 0
    for source, plan in in_parts(sources, plans):
        more = max(source.size * 20, 1_000_000) if source.kind == 'pdf' else source.size
        is_full = not tasks or cost + more > TASK_BYTES or len(tasks[-1]['sources']) >= TASK_FILES
        if is_full or source.kind == 'hf':
            cost = 0
            tasks.append({
                'folder': work, 'cwd': os.getcwd(), 'sources': [], 'plans': [], 'seed': seed, 'chars': chars,
                'options': options,
            })
        tasks[-1]['sources'].append(list(source))
        tasks[-1]['plans'].append(plan)
        cost += more
    for task in tasks:
        result_depends_on = [task[name] for name in ('sources', 'plans', 'seed', 'chars', 'options')]
        task['key'] = spool.digest([spool.FORMAT, [version_of(name) for name in PACKAGES], result_depends_on])[:32]
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


def version_of(package):
    """Of an installed package; '' where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ''


def in_parts(sources, plans):
    """Yields (source, plan), and for a streamed dataset one for each of its shards."""
    for source, plan in zip(sources, plans):
        if source.kind == 'hf':
            for shard in shards_of(source.path):
                yield source, plan | {'shard': shard}
        else:
            yield source, plan


def shards_of(spec):
    """[(number of shards, index)] of a streamed dataset, to be read side by side."""
    try:
        rows = hub.open_hf(spec)
    except ImportError:
        fail(f'{spec}: needs the package datasets: pip install datasets')
    except Exception as error:  # the hub, the net, the formats behind it: anything
        fail(hub.unreachable(spec, error))
    n = getattr(rows, 'num_shards', 1)
    return [(n, i) for i in range(n)]


def extract(tasks, work):
    """Does the tasks that the journal has not yet. Returns the reports, in the order of the tasks.
    """
    reports = {task['key']: spool.report_of(work, task['key']) for task in tasks}
    todo = [task for task in tasks if not reports[task['key']] or reports[task['key']]['again']]
    if len(todo) < len(tasks):
        print(f'going on: {len(tasks) - len(todo):,} of {len(tasks):,} parts were read before')
    total = sum(Source(*source).size for task in todo for source in task['sources'])
    progress = report.Progress('reading', total)
    for size in pool.map_tasks(spool.extract, todo, window=64):
        progress.add(size)
    progress.close()
    for task in todo:
        reports[task['key']] = spool.report_of(work, task['key'])
    return [reports[task['key']] for task in tasks]
