"""The text in the cells of a table: strings, lists of them, conversations; and that of a whole row.

    cells.text_of([{'role': 'user', 'content': 'Hi'}, {'role': 'bot', 'content': 'Hello'}])
                                                       # 'user: Hi\\n\\nbot: Hello'
    cells.row_text(row, ['question', 'answer'])        # the two, an empty line between them
    cells.row_text(row, ['meta.body'])                 # row['meta']['body']

Rows come from JSON, csv, parquet, Arrow and the hub, as a dict of what the format has: a column has
the same text whatever file it comes in.
"""
import json
import math

from mambino.prepare.tables.turns import turns_of

AS_IT_STANDS = '*'  # as a column: the whole row


def text_of(value):
    """The text in a cell of a table: a str, a list of them, one a line, or a conversation; None for
    anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    if isinstance(value, dict):
        return conversation(value)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if are_strings(value):
        return '\n'.join(map(text_of, value))
    if all(isinstance(item, dict) for item in value):
        return conversation(value)
    if all(isinstance(item, str) or isinstance(item, dict) and isinstance(item.get('text'), str) for item in value):
        return ''.join(item if isinstance(item, str) else item['text'] for item in value)  # marked words in it
    if all(isinstance(item, list) and are_strings(item) for item in value):
        return '\n\n'.join(map(text_of, value))
    return None


def are_strings(values):
    """Whether a list has texts alone, and one at least."""
    return bool(values) and all(isinstance(value, (str, bytes)) for value in values)


def conversation(value):
    """The turns as 'role: text', an empty line between them; None where that is not what they are.
    A turn that says nothing, as a call of a tool, is left out.
    """
    turns = turns_of(value) or []
    return '\n\n'.join(f'{who}: {what}' for who, what, _ in turns if what.strip()) or None


# -----------------------------------------------------------------------------
# Cells of rows

def cell(row, name):
    """What a row has in a column; 'meta.body' may also be the body of its meta, and 'pages.text' the
    texts of all its pages. None where there is nothing.
    """
    if isinstance(row, dict):
        if name in row:
            return row[name]
        first, dot, rest = name.partition('.')
        while dot:  # names may have dots of their own
            if first in row:
                return cell(row[first], rest)
            more, dot, rest = rest.partition('.')
            first = f'{first}.{more}'
        return None
    if isinstance(row, (list, tuple)):
        values = [cell(item, name) for item in row]
        return [value for value in values if value is not None] or None
    return None


def cell_text(row, name):
    """The text of a cell beside others; a number is its digits. None where there is none."""
    value = cell(row, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else None  # nan stands for a missing one
    return text_of(value)


def row_text(row, columns):
    """The texts of these columns of a row, an empty line between them; those that have none are left
    out. None where all are.
    """
    if columns == [AS_IT_STANDS]:
        return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    if len(columns) == 1:
        return text_of(cell(row, columns[0]))
    texts = [cell_text(row, name) for name in columns]
    return '\n\n'.join(text.strip('\n') for text in texts if text and not text.isspace()) or None
