"""csv_rows.py: a document a row, in whatever dialect a file is written."""
import csv
import io
import json
import random

import pytest
from helpers.readers import OPTIONS, read, reason, write

from mambino.prepare.files import Notes, Skip
from mambino.prepare.tables import csv_look, csv_rows

WORDS = 'the cat sat on a mat and watched how rain fell over old roofs while nobody said much about it'.split()


def prose(seed):
    """A sentence."""
    rng = random.Random(seed)
    return ' '.join(rng.choices(WORDS, k=rng.randint(5, 20))).capitalize() + '.'


TEXTS = [prose(i) for i in range(60)]


def table(row, header='id,text\n', texts=TEXTS):
    """A file: the header, and row(i, text) for each text."""
    return header + ''.join(row(i, text) for i, text in enumerate(texts))


def written(rows, **dialect):
    """What the csv module writes."""
    out = io.StringIO(newline='')
    csv.writer(out, **dialect).writerows(rows)
    return out.getvalue()


@pytest.fixture
def check(tmp_path):
    """Reads a csv file of some content."""
    def check(content, name='a.csv', **options):
        return read(write(tmp_path / name, content), **options)
    return check


def test_csv(check):
    documents, notes = check('id,text,n\r\n1,"two\r\nlines, ""quoted""",3\r\n\r\n2\r\n3,,4\r\n')
    assert documents == ['two\nlines, "quoted"']
    assert notes == ['1 rows end early: the header has 3 fields', '2 rows without text in text']
    assert check('id\tText\n1\ta, b; c\n', 'a.tsv')[0] == ['a, b; c']
    assert check('\ufeffid;content\n1;ü\n')[0] == ['ü']
    assert check('id;content\n1;ü\n'.encode('cp1252'))[0] == ['ü']
    assert check('text\nhello, world\n')[0] == ['hello, world']
    assert check('a,b\n1,2\n', text_column='b')[0] == ['2']
    for plain in ('body of the letter\n', '\n\n', '"', 'Dear Anna,\n\nI came, and saw, and went.\nYours, Bob\n'):
        assert check(plain) == ([plain], ['no table: taken as plain text'])
    long = 'so ' * 1_000_000 + 'on'  # csv's own limit is 131072
    assert check(f'id,text\n1,{long}\n')[0] == [long]
    assert check('id,text\n1,a\0b\n')[0] == ['ab']


def test_a_column_of_a_usual_name_may_begin_empty(check):
    assert check('text\nhello\tworld, foo\n')[0] == ['hello\tworld, foo']


# -----------------------------------------------------------------------------
# Dialects

@pytest.mark.parametrize('content', [
    table(lambda i, text: f'{i};{i},50;{text}\n', 'id;preis;text\n'),
    table(lambda i, text: f'{i},50;{text}\n', 'preis;text\n'),
    table(lambda i, text: f'{i}|{text}\n', 'id|text\n'),
    table(lambda i, text: f'|{i}|{text}|\n', '|id|text|\n'),
    table(lambda i, text: f'{i}^{text}\n', 'id^text\n'),
    table(lambda i, text: f'{i};{text}\r\n', 'sep=;\r\nid;text\r\n'),
    table(lambda i, text: f'{i}\t{text}\n', 'sep=\t\nid\ttext\n'),
    table(lambda i, text: f'{i},{text}\n', '# made, by us\n# today\nid,text\n'),
    table(lambda i, text: f'#{i}\t{text}\n', '#id\ttext\n'),
    table(lambda i, text: f'{["ham", "spam"][i % 2]},{text},,,\n', 'v1,v2,,,\n'),
    table(lambda i, text: f'| {i} | {text} |\n', '| id | text |\n|:--|---|\n'),
    table(lambda i, text: f'{i},{text}\n', 'id,text\n--,----\n'),
    table(lambda i, text: f'{i},{text}\n\n', '\n\nid,text\n\n'),
    table(lambda i, text: f'{i},en,{text}\n', 'Reviews of the year\n\nid,lang,text\n'),
    table(lambda i, text: f'{i},en,{text}\n', 'Reviews of the year,,\n,,\nid,lang,text\n'),
    table(lambda i, text: f'{i},{text}\n', 'Reviews of the year\nid,text\n'),
    table(lambda i, text: f'{i},{text}\n', 'Reviews of the year\nAs of 2023-01-02\n\nid,text\n'),
    table(lambda i, text: f'2023/01/{i % 28 + 1:02} 10:00 AM;{text}\n', 'When?;How was it, for all of you?\n'),
    table(lambda i, text: f'{text}\n', 'Review Text\n'),
    table(lambda i, text: f'{i},{text}\r', 'id,text\r'),
    table(lambda i, text: f'{i},{text}' + ('\r', '\n', '\r\n')[i % 3]),
    table(lambda i, text: f'{i},{text}\n', ''),
    table(lambda i, text: f'{("pos", "neg")[i % 2]}\t{text}\n', ''),
    table(lambda i, text: f'{text},{i},{text[::-1]}\n', 'text,id,text\n'),
    table(lambda i, text: f'{i},{text},0\n', ',text,label\n'),
    table(lambda i, text: f'{i},{text}\n', ',0\n'),
    table(lambda i, text: f'"{i}","{text}",5\n', '"text","n"\n'),
    table(lambda i, text: f'{i},{text},\n'),
    table(lambda i, text: f'{i},{text},\n', 'id,text,\n'),
    table(lambda i, text: f'{i},{text}\n', 'id,text,\n'),
    table(lambda i, text: f'{i} \t {text}\n', 'id \t text\n'),
    table(lambda i, text: f'{text}\n', 'sentence\n'),
    written([['id', 'text'], *enumerate(TEXTS)], delimiter='\t', quoting=csv.QUOTE_ALL),
    table(lambda i, text: f'{i}\t"{text}"\r\n', '\ufeffid\ttext\r\n').encode('utf-16-le'),
    table(lambda i, text: f'{i}\x01{text}\n', ''),
], ids=[
    'semicolon', 'decimal commas', 'pipe', 'pipes around', 'caret', 'sep=', 'sep=tab', 'comments',
    'header in a comment', 'unnamed columns', 'Markdown', 'SQL Server', 'blank lines', 'title', 'title in cells',
    'short title', 'two titles', 'questions',
    'two words', 'CR', 'mixed ends', 'no header', 'no header, labels', 'a name twice',
    'no name', 'number as name', 'names of rows', 'delimiter at ends', 'everywhere', 'of the header', 'blanks',
    'one column', 'all quoted', 'UTF-16', 'Hive',
])
def test_dialects(check, content):
    assert check(content) == (TEXTS, [])


QUOTED = [f'{text}, "{i}"' + '\nand\tmore;' * (i % 3) for i, text in enumerate(TEXTS)]
# begins and ends with quotes that are meant
SPOKEN = ['"Yes, he said.', 'plain', '"No" she said', '"Go home."', 'he said "hi"', '"a" and "b"', '= "x" ='] * 9


@pytest.mark.parametrize('content, texts', [
    (written([['id', 'text'], *enumerate(QUOTED)]), QUOTED),
    (written([['id', 'text'], *enumerate(QUOTED)], delimiter='\t'), QUOTED),
    (written([['id', 'text'], *enumerate(QUOTED)], quotechar="'"), QUOTED),
    (written([['text'], *([text] for text in QUOTED)]), QUOTED),
    (written([['review'], *([text] for text in QUOTED)], quoting=csv.QUOTE_ALL), QUOTED),
    (written([['id', 'text'], *enumerate(QUOTED)], doublequote=False, escapechar='\\'), QUOTED),
    (table(lambda i, text: f'{i}\t{text}\n', 'id\ttext\n', SPOKEN), SPOKEN),
    (table(lambda i, text: f'{text}\n', 'text\n', SPOKEN), SPOKEN),
    ('id, text\n1, "hello, world"\n2, "good, day"\n', ['hello, world', 'good, day']),
    ('id,text\n1, "hello, world"\n2, "good, day"\n', ['hello, world', 'good, day']),
    ('"id" , "text"\n1 , "hello, world"\n2 , "good, day"\n', ['hello, world', 'good, day']),
    (table(lambda i, text: f'{i},"a \\"b\\", c ""d"" {text}"\n'), [f'a "b", c "d" {text}' for text in TEXTS]),
    (table(lambda i, text: f'{i},\\N,"{text}\\"\\\nnew \\\\ line"\n', 'id,note,text\n'),
     [f'{text}"\nnew \\ line' for text in TEXTS]),
    (table(lambda i, text: f'{i}\t\\N\tone\\ntwo \\\\ three\\t{text}\n', 'id\tnote\ttext\n'),
     [f'one\ntwo \\ three\t{text}' for text in TEXTS]),
    (table(lambda i, text: f'{i}\tone\\\ntwo\\\tx {text}\n', 'id\ttext\n'), [f'one\ntwo\tx {text}' for text in TEXTS]),
    (table(lambda i, text: f'{i}\t\\frac \\nu {text}\n', 'id\ttext\n'), [f'\\frac \\nu {text}' for text in TEXTS]),
    (table(lambda i, text: f'{i},it is 5" wide: {text}\n'), [f'it is 5" wide: {text}' for text in TEXTS]),
    (table(lambda i, text: f"{i},'tis so {text}\n"), [f"'tis so {text}" for text in TEXTS]),
    (table(lambda i, text: f'{i},{text}, and, so on\n'), [f'{text}, and, so on' for text in TEXTS]),
    (table(lambda i, text: f'{i},{text}{", so" * (i % 9 == 3)}\n'),
     [f'{text}{", so" * (i % 9 == 3)}' for i, text in enumerate(TEXTS)]),
], ids=[
    'csv', 'tsv', 'single quotes', 'one column', 'one column, all quoted', 'backslashes', 'quotes in a tsv',
    'quotes in one column', 'blanks', 'blanks in rows', 'blanks before commas', 'both escapes', 'MySQL',
    'PostgreSQL', 'backslash and line end', 'backslashes that are meant', 'inches', 'apostrophes',
    'commas in the last column', 'few commas in the last column',
])
def test_quotes(check, content, texts):
    documents, notes = check(content)
    assert documents == texts and not notes


def test_tables_within_cells(check):
    """Lines that look like rows are no reason to doubt quotes that all fit."""
    poems = ['Roses, red\nViolets, blue\nSugar, sweet\n' * (1 + i % 5) for i in range(60)]
    assert check(written([['title', 'text'], *((f'No {i}', poem) for i, poem in enumerate(poems))])) == (poems, [])
    tables = [f'x,y\n1,2\n3,4\n5,{i}\n' for i in range(60)]
    assert check(written([['id', 'text'], *enumerate(tables)])) == (tables, [])


def test_a_long_cell(check):
    book = '\n'.join(TEXTS * 200)
    assert check(written([['id', 'text'], [1, book], [2, 'Short, one.'], [3, book]]))[0] == [book, 'Short, one.', book]


def test_long_cells_behind_short_ones(check):
    texts = [f'{TEXTS[i % 60]} {i}' for i in range(15_000)]
    texts += ['\n'.join(f'{text} "{i}", so' if i % 7 == 0 else text for text in TEXTS * 20) for i in range(30)]
    assert check(written([['id', 'text'], *enumerate(texts)])) == (texts, [])


# -----------------------------------------------------------------------------
# What does not fit

@pytest.mark.parametrize('is_quoted', [False, True])
@pytest.mark.parametrize('bad', [[3], [5000], [9999], range(37, 10_000, 1000)])
def test_a_quote_that_never_closes(check, bad, is_quoted):
    rows = [f'"{TEXTS[i % 60]}, {i}"' if is_quoted else f'{TEXTS[i % 60]} {i}' for i in range(10_000)]
    want = [row.strip('"') for row in rows]
    for i in bad:
        rows[i] = want[i] = f'"never closed {i}'
    documents, notes = check(table(lambda i, text: f'{i},{text}\n', texts=rows))
    assert documents == want
    assert notes == [f'{len(bad)} rows have quotes that do not close: taken as they stand']


def test_quotes_that_are_not_doubled(check):
    documents, notes = check(table(lambda i, text: f'{i},"he said "hi" to, me {text}",x\n', 'id,text,n\n'))
    assert documents == [f'he said "hi" to, me {text}' for text in TEXTS]
    assert notes == ['60 rows have quotes that do not close: taken as they stand']


def test_rows_that_do_not_fit_the_header(check, tmp_path):
    documents, notes = check(table(lambda i, text: f'{i},{text}{", more" * (i % 20 == 3)},en\n', 'id,text,lang\n'))
    assert documents == [text for i, text in enumerate(TEXTS) if i % 20 != 3]
    assert notes == ['3 rows have 4 fields, the header 3']
    documents, notes = check(table(lambda i, text: f'{i},{text}\n' + 'and so\n' * (i % 20 == 3)))
    assert documents == TEXTS and notes == ['3 rows have 1 field, the header 2']
    content = table(lambda i, text: f'{i},{text}{", more" * (i % 2)},en\n', 'id,text,lang\n')
    assert reason(write(tmp_path / 'b.csv', content)) == '30 of the first 60 rows have 4 fields, the header 3'
    content = table(lambda i, text: f'{i},{text}, more,en\n', 'id,text,lang\n')
    assert reason(write(tmp_path / 'b.csv', content)) == '60 of the first 60 rows have 4 fields, the header 3'
    content = table(lambda i, text: f'{text}, more,en\n', 'text,lang\n')
    assert reason(write(tmp_path / 'b.csv', content)) == '60 of the first 60 rows have 3 fields, the header 2'
    content = table(lambda i, text: f'{i},{text},{("pos", "neg")[i % 2]}\n')
    assert reason(write(tmp_path / 'b.csv', content)) == '60 of the first 60 rows have 3 fields, the header 2'
    ends_early = table(lambda i, text: f'{i},{text}{",en,5" * (i % 6 > 0)}\n', 'id,text,lang,score\n')
    assert check(ends_early) == (TEXTS, ['10 rows end early: the header has 4 fields'])


def test_comments_between_rows(check):
    content = table(lambda i, text: f'{i},{text}\n' + '# later, too\n' * (i % 20 == 9), '# made, by us\nid,text\n')
    assert check(content) == (TEXTS, ['3 lines begin with #: left out as comments'])


def test_rows_in_quotes_as_a_whole(tmp_path):
    content = table(lambda i, text: f'"{i},""{text}"""\n', '"id,text"\n')
    assert reason(write(tmp_path / 'a.csv', content)) == 'each of its rows is in quotes as a whole: take them off'


def test_the_header_again(check):
    parts = [table(lambda i, text: f'{i},{text}\n', texts=TEXTS[i:i + 20]) for i in (0, 20, 40)]
    assert check(''.join(parts)) == (TEXTS, ['2 times the header again: left out'])


def test_tables_without_a_text(tmp_path):
    path = tmp_path / 'a.csv'
    assert reason(write(path, 'id,text\n')) == 'empty: no rows below the header'
    assert reason(write(path, 'text\n')) == 'empty: no rows below the header'
    numbers = ''.join(f'{i},{i * 2},{i / 3:.3f}\n' for i in range(500))
    assert reason(write(path, 'a,b,c\n' + numbers)) == (
        'no clear text column among: a, b, c: a holds numbers, not text')
    assert reason(write(path, numbers)) == (
        'no clear text column among: column1, column2, column3: column1 holds numbers, not text')


def test_settings_are_obeyed_or_refused(check, tmp_path):
    content = table(lambda i, text: f'{text},{i},{text[::-1]}\n', 'question,n,Answer\n')
    assert check(content, text_column='answer')[0] == [text[::-1] for text in TEXTS]
    assert check(content, text_column='question,answer')[0] == [f'{text}\n\n{text[::-1]}' for text in TEXTS]
    assert check('The words\nhello, world\n\ngood, day\n', text_column='the words')[0] == ['hello, world', 'good, day']
    path = write(tmp_path / 'letter.csv', 'Dear Anna,\n\nI came, and saw, and went.\nYours, Bob\n')
    with pytest.raises(Skip, match='^no table, and so no column text$'):
        csv_look.look(str(path), OPTIONS | {'text_column': 'text'})


def test_json_that_is_called_csv(check):
    assert check(''.join(json.dumps({'id': i, 'text': text}) + '\n' for i, text in enumerate(TEXTS)))[0] == TEXTS


def test_a_table_that_is_called_json(tmp_path):
    path = write(tmp_path / 'a.json', 'id,text\n' + '1,bread and tea\n' * 9)
    assert read(path)[0] == ['bread and tea'] * 9


def test_tables_that_are_called_texts(check):
    content = table(lambda i, text: f'{i}\t{text}\n', 'id\ttext\n')
    assert check(content, 'a.txt') == (TEXTS, [])
    assert check(content.encode('utf-16'), 'b.txt') == (TEXTS, [])
    quoted = written([['id', 'text'], *enumerate(TEXTS)], delimiter='\t', quoting=csv.QUOTE_ALL)
    assert check(quoted, 'b.txt') == (TEXTS, [])
    strange = written([['when', 'what'], *enumerate(TEXTS)], delimiter='\t', quoting=csv.QUOTE_ALL)
    assert check(strange, 'b.txt')[0] == [strange.replace('\r', '')]
    for plain in (
        'text, and more of it\n' + '\n'.join(TEXTS), 'id,text\n' + '\n'.join(TEXTS), 'id,text\n1,so\n2,on\n',
        table(lambda i, text: f'{i}\t{text}\n', '')):
        assert check(plain, 'c.txt') == ([plain], [])


def test_a_wide_table_of_numbers(tmp_path):
    content = ','.join(f'pixel{i}' for i in range(784)) + '\n' + (','.join('0123456' * 112) + '\n') * 300
    assert reason(write(tmp_path / 'a.csv', content)).startswith('no clear text column among: pixel0, pixel1')


# -----------------------------------------------------------------------------
# Parts

@pytest.mark.parametrize('content', [
    table(lambda i, text: f'{i},{text} {i}\n', texts=TEXTS * 20),
    table(lambda i, text: f'{i}\t"{text} {i}\n', 'id\ttext\n', texts=TEXTS * 20),
    written([['id', 'text'], *enumerate(f'{text}\n\n"so", {i}' for i, text in enumerate(TEXTS * 20))]),
    table(lambda i, text: f'{i},"{text} {i}{chr(34) * (i != 600)}\n', texts=TEXTS * 20),
    table(lambda i, text: f'{i},{text}\\\nand {i}\n', texts=TEXTS * 20),
], ids=['no quotes', 'quotes that are letters', 'lines in quotes', 'a quote that never closes', 'escaped line ends'])
def test_parts_are_the_whole(tmp_path, monkeypatch, content):
    path = write(tmp_path / 'a.csv', content)
    whole = read(path)
    monkeypatch.setattr(csv_look, 'PART_BYTES', 10_000)
    plan = csv_look.look(str(path), OPTIONS)['plan'] | {'columns': ['text']}
    parts = plan.pop('parts')
    assert len(parts) > 5 and parts[0][0] == 0 and parts[-1][1] == len(content.encode())
    documents = []
    for part in parts:
        documents += [text for text, _ in csv_rows.read_csv(str(path), OPTIONS | plan | {'part': part}, Notes())]
    assert documents == whole[0]


def test_files_that_are_read_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_look, 'PART_BYTES', 10_000)
    content = table(lambda i, text: f'{i},"{text}\n{i}"\n', texts=TEXTS * 20)
    assert csv_look.look(str(write(tmp_path / 'a.csv', content.encode('utf-16'))), OPTIONS)['plan']['parts'] == []
    one = written([['text'], *([f'{text}\n{i}'] for i, text in enumerate(TEXTS * 20))])
    assert csv_look.look(str(write(tmp_path / 'b.csv', one)), OPTIONS)['plan']['parts'] == []


def test_a_row_that_is_too_long(check, monkeypatch):
    monkeypatch.setattr(csv_rows, 'LONGEST_LINE', 1 << 19)
    monkeypatch.setattr(csv_rows, 'BLOCK', 1000)
    content = table(lambda i, text: f'{i},{text}{"x" * (600_000 * (i == 30))}\n')
    documents, notes = check(content)
    assert len(documents) >= 50 and notes == ['1 rows are too long']
