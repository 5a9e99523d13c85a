"""The rows of a workbook, of which --text_column says what to read: a document a row, as in csv.

    for text, last in sheets.rows_of_sheets(documents, options, notes): ...    # of office.py, opendocument.py

Without --text_column a sheet is one document; but one of questions and answers is conversations.
"""
from mambino.prepare.files import Skip
from mambino.prepare.tables import columns, talks
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.csv_header import distinct
from mambino.prepare.tables.looks import new_column, profile_of
from mambino.prepare.tables.rows import rows_of


def rows_of_sheets(documents, options, notes):
    """The documents as they are, a sheet each with tabs between its cells; or the texts in the columns
    that options['text_column'] names, of the sheets that have them. Skip where none has. Sheets of
    questions and answers are conversations.
    """
    wanted = options['text_column']
    if wanted == AS_IT_STANDS:
        yield from documents
        return
    taken = 0
    reasons = []
    for pieces in sheets_in(documents):
        head = next(pieces)
        if not wanted and not may_converse(head[0], options):
            yield head
            yield from pieces
            continue
        held = [head, *pieces]
        rows, profile = table_of(''.join(text for text, _ in held))
        if not profile:
            continue
        chosen, reason = columns.wanted(profile, wanted) if wanted else columns.choose(profile)
        speakers = talks.speakers(chosen, profile, options)
        if not wanted and not speakers:
            yield from held
            continue
        if not chosen:
            reasons.append(reason)
            continue
        facts = {'columns': columns.form_of(chosen, profile)} | talks.said_of(chosen, speakers, profile, options)
        plan = {'columns': chosen, 'facts': facts, 'speakers': speakers}
        try:
            yield from rows_of(rows, plan, notes)
            taken += 1
        except Skip as nothing:  # no text in them
            reasons.append(str(nothing))
    if reasons and not taken:
        raise Skip(reasons[0])
    notes += [f'a sheet was left out: {reason}' for reason in reasons]


def sheets_in(documents):
    """Yields for each sheet a generator of its pieces, (text, last), which is to be used up."""
    documents = iter(documents)

    def rest(piece):
        yield piece
        while not piece[1]:
            piece = next(documents, ('', True))
            yield piece

    for piece in documents:
        yield rest(piece)


def may_converse(text, options):
    """Whether a sheet that begins so has columns of questions and of answers, by their names."""
    names = {talks.base_of(name.strip()) for name in text.partition('\n')[0].split('\t')}
    is_pair = names & set(columns.ASKED) and names & set(columns.ANSWERED) or names & set(columns.TALKS)
    return bool(is_pair) and options.get('conversations') in (talks.AUTO, talks.ALWAYS)


def table_of(text):
    """(rows as dicts, their profile) of a sheet whose first line has the names of its columns."""
    lines = [line.split('\t') for line in text.split('\n') if line]
    if not lines:
        return [], {}
    names = distinct(lines[0])
    rows = [dict(zip(names, cells)) for cells in lines[1:]]
    return rows, profile_of(rows, {name: new_column() for name in names})
