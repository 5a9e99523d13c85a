"""The rows of a workbook, of which --text_column says what to read: a document a row, as in csv.

    for text, last in sheets.rows_of_sheets(documents, options, notes): ...    # of office.py, opendocument.py

Without --text_column a sheet is one document.
"""
from mambino.prepare.files import Skip
from mambino.prepare.tables import columns
from mambino.prepare.tables.cells import AS_IT_STANDS, rows_of
from mambino.prepare.tables.csv_header import distinct
from mambino.prepare.tables.looks import new_column, profile_of


def rows_of_sheets(documents, options, notes):
    """The documents as they are, a sheet each with tabs between its cells; or the texts in the columns
    that options['text_column'] names, of the sheets that have them. Skip where none has.
    """
    wanted = options['text_column']
    if not wanted or wanted == AS_IT_STANDS:
        yield from documents
        return
    taken = 0
    reasons = []
    for rows, profile in tables_of(documents):
        chosen, reason = columns.wanted(profile, wanted)
        if not chosen:
            reasons.append(reason)
            continue
        facts = {'columns': columns.form_of(chosen, profile)}
        try:
            yield from rows_of(rows, {'columns': chosen, 'facts': facts}, notes)
            taken += 1
        except Skip as nothing:  # no text in them
            reasons.append(str(nothing))
    if reasons and not taken:
        raise Skip(reasons[0])
    notes += [f'a sheet was left out: {reason}' for reason in reasons]


def tables_of(documents):
    """Yields (rows as dicts, their profile) of sheets whose first line has the names of their columns."""
    pieces = []
    for text, last in documents:
        pieces.append(text)
        if not last:
            continue
        lines = [line.split('\t') for line in ''.join(pieces).split('\n') if line]
        pieces.clear()
        if not lines:
            continue
        names = distinct(lines[0])
        rows = [dict(zip(names, cells)) for cells in lines[1:]]
        yield rows, profile_of(rows, {name: new_column() for name in names})
