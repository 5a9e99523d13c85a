"""What stands above the rows of a table, and what its columns look like.

    csv_header.is_header(['id', 'text'], rows, 'np')     # True: these are names
    csv_header.kinds_of(rows, width)                     # 'np': numbers, prose
"""
import re

from mambino.prepare.tables.csv_records import NULL, NUMBER

# what columns are called
USUAL = '''
    text content body document article story passage code sentence sentences title label id name lang
    language message review comment summary question answer prompt completion response instruction
    input output url source target date category tweet headline description abstract score'''.split()
LONG = 40  # characters of a cell that may be a sentence
MANY = 10  # cells that tell what a column has
DIGIT = re.compile(r'\d')
NAME = re.compile(r'#?[^\W\d][\w .:/()#%-]{0,59}')  # what they may be called


def is_header(first, rows, kinds):
    """Whether the first row has the names of the columns, rather than data."""
    names = [cell.strip() for cell in first]
    if len(names) != len(kinds) or not rows:
        return bool(names_of(first))
    if any(name.lower() in USUAL for name in names) and names_of(first):
        return True
    numbers = [bool(NUMBER.fullmatch(name)) for name in names]
    if any(kind == 'n' and is_number for kind, is_number in zip(kinds, numbers)):
        return names == [str(i) for i in range(len(names))]
    if any(kind == 'n' and name for kind, name in zip(kinds, names)):
        return True
    if all(is_number or not name for is_number, name in zip(numbers, names)):
        return True  # 0, 1, 2 above texts
    if any(stands_above_numbers(name, [row[i] for row in rows]) for i, name in enumerate(names)):
        return True
    if not names_of(first):
        return False
    for i, name in enumerate(names):
        if name and any(row[i].strip() == name for row in rows):
            return False
    lengths = [sum(len(row[i]) for row in rows) / len(rows) for i in range(len(names))]
    is_one = len(names) == 1  # it was taken for a table by its name alone
    return is_one or any(2 * len(name) < length and ' ' not in name for name, length in zip(names, lengths) if name)


def stands_above_numbers(name, cells):
    """Whether there is a digit in every cell of a column, as in dates and numbers, and none in its name."""
    cells = [cell for cell in cells if cell.strip()]
    if not name or DIGIT.search(name) or len(cells) < MANY:
        return False
    return all(DIGIT.search(cell) and len(cell) < LONG for cell in cells)


def names_of(cells):
    """The cells, if each can be the name of a column or is empty; None if not."""
    names = [cell.strip() for cell in cells]
    some = [name for name in names if name]
    good = [name for name in some if NAME.fullmatch(name) and name.count(' ') < 4 and name[-1] not in '.:']
    return names if good and len(good) >= 0.8 * len(some) and len(set(some)) > 0.5 * len(some) else None


def is_sure(cells):
    """Whether these are a header, by themselves: words that name columns."""
    names = names_of(cells)
    if not names:
        return False
    return all(names) and all(' ' not in name for name in names) or any(name.lower() in USUAL for name in names)


def numeric(cells):
    """Whether one of the cells is a number."""
    return any(NUMBER.fullmatch(cell.strip()) for cell in cells)


def distinct(names):
    """Names for all columns, no two the same: text, column2, text_2."""
    result = []
    for i, name in enumerate(names):
        name = name.strip() or f'column{i + 1}'
        once = name
        n = 1
        while name in result:
            n += 1
            name = f'{once}_{n}'
        result.append(name)
    return result


def is_title(cells, following, width):
    """Whether these stand above a table, rather than in it: names that follow are its header."""
    written = [cell for cell in cells if cell.strip()]
    if len(cells) == len(following) == 1 and width == 2:
        return True  # two lines of a title
    if len(cells) == width - 1:
        return len(following) == width and is_sure(following) and not is_sure(cells)
    return len(cells) < width or width > 2 and len(written) < 2


def kinds_of(rows, width):
    """A letter for each column, see Dialect."""
    kinds = ''
    for i in range(width):
        cells = [cell for row in rows if (cell := row[i].strip()) not in ('', NULL)]
        least = 0.9 * len(cells)  # a row that is broken may have others' cells
        if cells and sum(bool(NUMBER.fullmatch(cell)) for cell in cells) >= least:
            kinds += 'n'
        elif cells and sum(' ' not in cell and len(cell) < 100 for cell in cells) >= least:
            kinds += 'w'
        elif cells and sum(' ' in cell for cell in cells) >= 0.9 * len(cells):
            kinds += 'p'
        else:
            kinds += 't'
    return kinds


def are_names_of_rows(rows, kinds):
    """Whether the first cells, above which the header has nothing, are numbers or names of rows, as R
    writes them; and not all of the row is moved by a comma in a sentence.
    """
    spaced = [sum(cell.startswith(' ') for cell in cells) for cells in zip(*rows)][1:]
    return kinds[0] in 'nw' and not (any(n > 0.5 * len(rows) for n in spaced) and not has_blanks(rows))


def has_blanks(rows):
    """Whether cells begin with a blank, as in 'id, text'."""
    later = [cell for row in rows for cell in row[1:] if cell]
    return bool(later) and sum(cell.startswith(' ') for cell in later) > 0.5 * len(later)
