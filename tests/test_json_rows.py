"""json_rows.py: a document a row, whatever form of JSON it is."""
import json

from helpers.readers import read, reason, write

from mambino.prepare import json_rows


def lines(*rows):
    return ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)


def test_jsonl(tmp_path):
    def check(content, **options):
        return read(write(tmp_path / 'a.jsonl', content), **options)
    documents, notes = check(
        lines(
            {'id': 1, 'text': 'one\r\nmore'},
            '', '{bad',
            {'id': 2},
            {'text': None},
            {'text': 'two \ud83d\ude00 \ud800 \0'},
            [1],
        )
    )
    assert documents == ['one\nmore', 'two 😀 \ufffd ']
    assert notes == ['3 rows without text in text', '1 lines were no JSON']
    assert check(lines({'id': 'x', 'Content': 'so'}))[0] == ['so']
    assert check(lines({'n': 1, 'sentence': 'the only one'}))[0] == ['the only one']
    assert check(lines({'text': ['two', 'lines']}))[0] == ['two\nlines']
    assert check(lines({'text': 'a', 'story': 'b'}), text_column='story')[0] == ['b']
    assert check(lines(*map(json.dumps, ['a string', 'another'])))[0] == ['a string', 'another']
    assert check(lines({'text': 'BOM'}).encode('utf-8-sig'))[0] == ['BOM']
    assert check(json.dumps({'text': 'ж'}, ensure_ascii=False).encode('utf-16'))[0] == ['ж']
    assert check(lines({'text': 'u2028 \u2028'}))[0] == ['u2028 \u2028']
    for odd in (
        lines({'a': 'x', 'b': 'y'}),
        lines([1, 2]),
        'not JSON\nat all\n',
        lines({'a': 1}) * 30,
        '[' * 100_000, '1' * 5000 + '\n'):
        documents, notes = check(odd)
        assert documents == [odd] and len(notes) <= 1
    assert check('caf\xe9\n'.encode('cp1252'))[1] == [
        'no clear text column; taken as plain text', 'encoding guessed: cp1252, as in "café"',
    ]
    assert (
        reason(write(tmp_path / 'b.jsonl', lines({'a': 'x'})), text_column='b')
        == 'no column b among: a'
    )


def test_a_line_of_jsonl_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, 'LONGEST_ROW', 1000)
    long = [{'text': 'x' * n} for n in (980, 985, 990, 1200, 2500)]
    documents, notes = read(write(tmp_path / 'a.jsonl', lines({'text': 'a'}, *long, {'text': 'b'})))
    # {"text": ""} takes 12
    assert documents == ['a', 'x' * 980, 'x' * 985, 'b'] and notes == ['3 lines were no JSON']


def test_json(tmp_path):
    def check(content):
        return read(write(tmp_path / 'a.json', content))
    rows = [{'id': 1, 'text': 'one'}, {'id': 2}, 3] + [{'text': f'{i}'} for i in range(30)]
    for indent in (None, 1):
        documents, notes = check(json.dumps(rows[:2] + rows[3:] + rows[2:3], indent=indent))
        assert documents == ['one'] + [str(i) for i in range(30)]
        assert notes == ['2 rows without text in text']
    for plain in (
        '[]', '{"text": "one"}', '[1, 2]', '[{"only": "x"}]', '[{"text": 1}]', '', '[', '[{]',
        '[' * 100_000, '3'):
        assert check(plain)[0] == [plain]


def test_a_column_of_a_usual_name_may_begin_empty(tmp_path):
    rows = [{'url': f'http://{i}', 'text': None if i < 25 else f'text {i}'} for i in range(40)]
    path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, rows)))
    assert read(path) == ([f'text {i}' for i in range(25, 40)], ['25 rows without text in text'])
