"""Documents of the rows of a table: the texts in some columns, or a conversation.

    for text, last in rows.rows_of(rows, options, notes): ...    # options: a plan of survey.py among them

Where the plan says who speaks in which column, a row is a conversation (conversations.py): packed,
and `last` is TALK.
"""
from collections import Counter

from mambino.prepare import conversations
from mambino.prepare.conversations import TALK, normalised, pack
from mambino.prepare.files import Skip
from mambino.prepare.tables.cells import cell, cell_text, row_text
from mambino.prepare.tables.talks import IN_TURNS, MESSAGES
from mambino.prepare.tables.turns import in_turns, turns_of, written


def rows_of(rows, options, notes):
    """Yields (text, True) for each of the rows that has text in options['columns']; counts the others.
    Skip where none has. options: a plan of survey.py among them.
    """
    columns = options['columns']
    shown = options.get('form') or ' + '.join(columns)
    notes.facts.update(options.get('facts', {}))
    if options.get('speakers'):
        documents = conversations_of(rows, options['speakers'], notes)
    else:
        documents = texts_of(rows, columns, options.get('written', []))
    empty = 0
    taken = 0
    for text, last in documents:
        if not text:
            empty += last is not None
            continue
        taken += 1
        yield text, last
    notes.taken += empty  # they were read, and are not lost
    in_one = 'part' not in options and 'shard' not in options
    if not taken and in_one and (empty or notes.lost):
        why = f'; {max(notes.lost.values()):,} {max(notes.lost, key=notes.lost.get)}' if notes.lost else ''
        raise Skip(f'no text in column {shown}{why}')
    if empty:
        notes.append(f'{empty:,} rows without text in {shown}')


def texts_of(rows, columns, in_writing):
    """Yields (text, True) of rows, or ('', True). in_writing: columns whose cells have their lists
    written as a text."""
    name = columns[0]
    is_one = len(columns) == 1
    for row in rows:
        if in_writing:
            row = {**row, **{name: written(cell(row, name)) or cell(row, name) for name in in_writing}}
        text = row.get(name) if is_one and isinstance(row, dict) else None  # most are as plain as that
        if not isinstance(text, str):
            text = row_text(row, columns)
        yield ('' if not text or text.isspace() else text), True


def conversations_of(rows, speakers, notes):
    """Yields (a packed conversation, TALK) of rows, ('', True) for one with nothing in it, and
    ('', None) for one that is lost, which is counted in the notes."""
    odd = Counter()
    try:
        for row in rows:
            turns = turns_in_row(row, speakers, odd)
            if turns is None:
                odd[conversations.NO_TURNS] += 1
                yield '', None
            elif not turns:
                yield '', True
            else:
                messages = normalised(turns, odd)
                yield (pack(messages), TALK) if messages else ('', None)
    finally:
        conversations.tell(odd, notes)


def turns_in_row(row, speakers, odd):
    """[(who, what, weight)] of a row, [] where there is nothing in it; None where a cell that should have turns
    has something else."""
    texts = {'system': [], 'user': [], 'assistant': []}
    turns = []
    for name, who in speakers:
        value = cell(row, name)
        if who == IN_TURNS:
            return in_turns(value) if value else []
        if who == MESSAGES:
            inner = written(value)
            value = value if inner is None else inner
            if isinstance(value, (list, tuple, dict)):
                more = turns_of(value, odd) if value else []
                if more is None:
                    return None
                goes_on = len(turns) == 0 or more[:len(turns)] != turns
                turns = turns + more if goes_on else more  # or it begins with what was asked
                continue
            who = 'assistant' if turns or texts['user'] else 'user'
        text = one_of(value) if who == 'assistant' else cell_text({name: value}, name)
        if text and not text.isspace():
            texts[who].append(text.strip('\n'))
    system, asked, answered = ([(who, '\n\n'.join(parts), 1)] if parts else [] for who, parts in texts.items())
    if any(conversations.role_of(who) == 'user' for who, *_ in turns):
        asked = []  # the turns begin with it
    if any(conversations.role_of(who) == 'system' for who, *_ in turns):
        system = []
    spoken = asked + turns + answered
    return system + spoken if spoken else []


def one_of(value):
    """The answer in a cell: of several, in a list, the first."""
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, str) and item.strip()), None)
    return cell_text({'': value}, '')
