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

from mambino.prepare.files import Skip

ROLES = ('role', 'from', 'speaker', 'author', 'sender', 'user')      # who says it,
SAYINGS = ('content', 'value', 'text', 'message', 'utterance', 'parts', 'body')  # and what
# names of turns that are their own role: [{'human': 'Hi', 'assistant': 'Hello'}]
ASKING = ('instruction', 'human', 'user', 'prompt', 'question', 'input', 'query')
ANSWERING = ('assistant', 'bot', 'gpt', 'model', 'response', 'answer', 'output', 'completion')
SPEAKERS = ('system', *ASKING, *ANSWERING)
REPLIES = ('replies', 'children')  # turns below a turn: a tree of messages
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
        return conversation([value] if replies_to(value) else turns_in(value))
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


def turns_in(value):
    """The turns of a conversation that is written {'role': [one, ...], 'content': [one, ...]}."""
    role = next((value[name] for name in ROLES if isinstance(value.get(name), list)), None)
    said = next((value[name] for name in SAYINGS if isinstance(value.get(name), list)), None)
    if not role or not said or len(role) != len(said) or role is said:
        return []
    return [{'role': who, 'content': what} for who, what in zip(role, said)]


def conversation(turns):
    """The turns as 'role: text', an empty line between them; None where that is not what they are.
    A turn that says nothing, as a call of a tool, is left out.
    """
    said = []
    for turn in turns:
        lines = turn_lines(turn)
        if lines is None:
            return None
        said += lines
    return '\n\n'.join(said) or None


def replies_to(turn):
    """The turns that stand below a turn, in a tree of messages."""
    replies = next((turn[name] for name in REPLIES if turn.get(name)), None)
    are_turns = isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies)
    return replies if are_turns else []


def turn_lines(turn):
    """The lines of a turn, ['user: Hi'], and of its replies; None for no turn."""
    lines = own_lines(turn)
    if lines is None:
        return None
    for reply in replies_to(turn):
        lines += turn_lines(reply) or []
    return lines


def own_lines(turn):
    """The line of one turn, or one for each of the speakers in it; None for no turn."""
    role = next((turn[name] for name in ROLES if isinstance(turn.get(name), str)), None)
    names = [name for name in SAYINGS if name in turn]
    if isinstance(role, str) and names and turn.get(names[0]) is not role:
        said = content_of(turn[names[0]])
        if said is None:
            return [] if turn[names[0]] in (None, [], '') else None
        return [f'{role}: {said}'] if said.strip() else []
    spoken = [name for name in turn if name.lower() in SPEAKERS and isinstance(turn[name], str)]
    sides = {name.lower() in ANSWERING for name in spoken if name.lower() != 'system'}
    if len(sides) == 2:  # one asks and one answers, which a model and its response do not
        return [f'{name}: {turn[name]}' for name in spoken if turn[name].strip()]
    return None


def content_of(value):
    """What is said in a turn: a text, or the texts among parts of several kinds; None for neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = value.get('parts', [value])
    if not isinstance(value, list) or not value:
        return None
    texts = []
    for part in value:
        if isinstance(part, dict):
            part = part.get('text') or ''  # an image has none
        if not isinstance(part, str):
            return None
        texts.append(part)
    return '\n'.join(filter(None, texts))


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


def rows_of(rows, options, notes):
    """Yields (text, True) for each of the rows that has text in options['columns']; counts the others.
    Skip where none has. options: a plan of survey.survey among them.
    """
    columns = options['columns']
    shown = options.get('form') or ' + '.join(columns)
    is_one = len(columns) == 1
    name = columns[0]
    empty = 0
    taken = 0
    notes.facts.update(options.get('facts', {}))
    for row in rows:
        text = row.get(name) if is_one and isinstance(row, dict) else None  # most are as plain as that
        if not isinstance(text, str):
            text = row_text(row, columns)
        if not text or text.isspace():
            empty += 1
            continue
        taken += 1
        yield text, True
    notes.taken += empty  # they were read, and are not lost
    in_one = 'part' not in options and 'shard' not in options
    if empty and not taken and in_one:
        raise Skip(f'no text in column {shown}')
    if empty:
        notes.append(f'{empty:,} rows without text in {shown}')
