"""json_rows.py, json_values.py and json_look.py: a document a row, whatever form of JSON it is."""
import gzip
import json
import random

import pytest
from helpers.readers import OPTIONS, read, reason, write

from mambino.prepare import files, isolate, survey
from mambino.prepare.files import Notes, Skip, judge
from mambino.prepare.sources import Source
from mambino.prepare.tables import json_look, json_rows, json_values

ROWS = [{'id': i, 'text': f'Story {i}: the baker has bread.', 'url': f'https://example.org/{i}'} for i in range(30)]
TEXTS = [row['text'] for row in ROWS]


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
    assert notes == ['3 rows without text in text', '1 lines were no JSON (first: line 3)']
    assert check(lines({'id': 'x', 'Content': 'so'}))[0] == ['so']
    assert check(lines({'n': 1, 'sentence': 'the only one'}))[0] == ['the only one']
    assert check(lines({'text': ['two', 'lines']}))[0] == ['two\nlines']
    assert check(lines({'text': 'a', 'story': 'b'}), text_column='story')[0] == ['b']
    assert check(lines(*map(json.dumps, ['a string', 'another'])))[0] == ['a string', 'another']
    assert check(lines({'text': 'BOM'}).encode('utf-8-sig'))[0] == ['BOM']
    assert check(json.dumps({'text': 'ж'}, ensure_ascii=False).encode('utf-16'))[0] == ['ж']
    assert check(lines({'text': 'u2028 \u2028'}))[0] == ['u2028 \u2028']
    assert check('id,text\n' + ''.join(f'{i},Bread and tea {i}\n' for i in range(9)))[0][8] == 'Bread and tea 8'
    assert check('not JSON\nat all\n') == (['not JSON\nat all\n'], ['no JSON in it: taken as plain text'])
    for odd, why in (
        (lines({'a': 'x', 'b': 'y'}), 'no clear text column among: a, b; say which with --text_column=a'),
        (lines([1, 2], [3, 4]), 'no clear text column among: 0, 1: 0 holds numbers, not text'),
        (lines({'a': 1}) * 30, 'no clear text column among: a: a holds numbers, not text'),
        (lines({'text': None}) + '{"text": ' + '[' * 900 + ']' * 900 + '}\n',
         'no clear text column among: text: text holds lists, not text'),
        ('[' * 100_000, 'broken JSON'),
        ('{' + '1' * 5000 + '\n', 'broken JSON'),
        (lines({'text': None}) * 3, 'no text in column text'),
        ("{'text': 'so it goes'}\n" * 9,
         "its rows are Python's, with single quotes, and not JSON: write them with json.dumps"),
        (lines({'text': 'good text'}) * 7 + '{"bad\n' * 3,
         'too much of it is lost: 3 lines were no JSON (first: line 8) of 10'),
    ):
        assert reason(write(tmp_path / 'a.jsonl', odd)) == why


def test_a_line_of_jsonl_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, 'LONGEST_ROW', 1000)
    long = [{'text': 'x ' * (n // 2)} for n in (980, 984, 990, 1200, 2500)]
    rows = [*long, *[{'text': 'b'}] * 9]
    documents, notes = read(write(tmp_path / 'a.jsonl', lines({'text': 'a'}, *rows)))
    # {"text": ""} takes 12
    assert [len(text) for text in documents] == [1, 980, 984] + [1] * 9
    assert notes == ['3 lines were too long']


FORMS = {
    'lines': lines(*ROWS),
    'no end': lines(*ROWS).rstrip('\n'),
    'windows': lines(*ROWS).replace('\n', '\r\n'),
    'old': lines(*ROWS).replace('\n', '\r'),
    'blank lines': '\n\n' + lines(*ROWS).replace('\n', '\n\n \n'),
    'commas': lines(*ROWS).replace('\n', ',\n'),
    'array': json.dumps(ROWS),
    'indented': json.dumps(ROWS, indent=2),
    'a row a line': '[\n' + lines(*ROWS).replace('\n', ',\n').rstrip(',\n') + '\n]\n',
    'a comma too many': '[' + lines(*ROWS).replace('\n', ',\n') + ']',
    'a comma too many inside': json.dumps({'version': 1, 'rows': ROWS}).replace(']}', ',]}'),
    'two arrays': json.dumps(ROWS[:10]) + '\n' + json.dumps(ROWS[10:]),
    'one after another': ''.join(map(json.dumps, ROWS)),
    'indented objects': '\n'.join(json.dumps(row, indent=4) for row in ROWS),
    'record separators': ''.join(f'\x1e{json.dumps(row)}\n' for row in ROWS),
    'not a number': lines(*({**row, 'score': float('nan')} for row in ROWS)),
    'data': json.dumps({'version': 1, 'data': ROWS}),
    'deep': json.dumps({'response': {'status': 'ok', 'docs': ROWS}, 'took': 3}, indent=1),
    'deeper': json.dumps({'a': {'b': {'c': {'rows': ROWS}}}}),
    'splits': json.dumps({'train': ROWS[:20], 'test': ROWS[20:]}),
    'keys': json.dumps({f'a{i}': row for i, row in enumerate(ROWS)}),
    'columns': json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    'numbered columns': json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    'split': json.dumps({'columns': list(ROWS[0]), 'data': [list(row.values()) for row in ROWS]}),
    'header': json.dumps([list(ROWS[0])] + [list(row.values()) for row in ROWS]),
    'header in lines': lines(list(ROWS[0]), *(list(row.values()) for row in ROWS)),
    'lists': lines(*(list(row.values()) for row in ROWS)),
    'twice': lines(*(json.dumps(json.dumps(row)) for row in ROWS)),
    'bom': '\ufeff' + lines(*ROWS),
    'bom array': '\ufeff' + json.dumps(ROWS),
    'tabs': lines(*ROWS).replace('the baker', 'the\tbaker'),
}


@pytest.mark.parametrize('form', FORMS)
def test_the_form_is_found_whatever_the_name(tmp_path, form):
    want = [text.replace('the baker', 'the\tbaker') for text in TEXTS] if form == 'tabs' else TEXTS
    for name in ('a.json', 'a.jsonl') if form == 'twice' else ('a.json', 'a.jsonl', 'a.txt', 'dump'):
        assert read(write(tmp_path / name, FORMS[form])) == (want, []), name
    for encoding in 'utf-16', 'utf-8':
        assert read(write(tmp_path / 'a.json', FORMS[form].encode(encoding)))[0] == want, encoding


def test_large_objects_are_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(json_look, 'HEAD', 500)
    monkeypatch.setattr(json_values, 'CHUNK', 100)
    for form in FORMS:
        if 'column' in form or form in ('split', 'lists') or 'header' in form:
            continue
        assert read(write(tmp_path / 'a.json', FORMS[form]))[0] == [
            text.replace('the baker', 'the\tbaker') if form == 'tabs' else text for text in TEXTS], form


def test_what_is_no_table(tmp_path):
    settings = [{'name': f'option {i}', 'on': True} for i in range(20)]
    for plain in (
        '[]', '{"text": "one"}', '[1, 2]', '[{"only": "x"}]', '[{"text": 1}]', '[', '[{]',
        '[' * 100_000, '3', json.dumps(settings),
        json.dumps({'name': 'a', 'scripts': {'run': 'x'}, 'files': ['a', 'b']}),
        json.dumps({'type': 'FeatureCollection', 'features': [{'geometry': {'at': [i, i]}} for i in range(9)]})):
        assert read(write(tmp_path / 'a.json', plain))[0] == [plain]
    with pytest.raises(Skip, match="Python's, with single quotes"):
        read(write(tmp_path / 'a.json', str(ROWS)))
    sayings = {'sayings': [{'saying': text, 'from': 'x'} for text in TEXTS]}
    assert read(write(tmp_path / 'a.json', json.dumps(sayings))) == ([json.dumps(sayings)], [
        'taken as plain text, for it may be settings; its rows are read with --text_column=saying'])
    paths = {f'/{i}': {'get': {'summary': TEXTS[i], 'id': f'get{i}'}} for i in range(30)}
    spec = {'title': 'A service', 'paths': paths}
    assert read(write(tmp_path / 'a.json', json.dumps(spec))) == ([json.dumps(spec)], [])
    talks = [
        {'title': f'On bread {i}', 'mapping': {f'{i}-{k}': {'said': TEXTS[k]} for k in range(4)}} for i in range(30)]
    assert read(write(tmp_path / 'a.json', json.dumps(talks)))[1] == [
        'no clear text column among: title, mapping; say which with --text_column=title; taken as plain text']
    many = json.dumps(settings * 10)
    assert reason(write(tmp_path / 'a.json', many)) == (
        'no clear text column among: name, on; say which with --text_column=name')
    assert len(read(tmp_path / 'a.json', text_column='name')[0]) == 200
    said = '"Good day," said Anna.\n"Good day."\n' * 9
    assert read(write(tmp_path / 'a.txt', said))[0] == [said]
    said = '"Good day."\n' * 9
    assert read(write(tmp_path / 'a.txt', said))[0] == [said]
    log = '[Intro]\nla la\n{"a": 1}\n' * 9
    assert read(write(tmp_path / 'a.txt', log))[0] == [log]


def test_damage_is_counted(tmp_path):
    assert judge(3, {'lines were bad': 5}) == ('most of it is lost: 5 lines were bad of 8', [])
    assert judge(90, {'lines were bad (first: line 7)': 5, 'lines were bad (first: line 60)': 1}) == (
        '', ['6 lines were bad (first: line 7)'])
    rows = [json.dumps(row) for row in ROWS]
    joined = '\ufeff' + '\n\ufeff'.join(rows)
    assert read(write(tmp_path / 'a.jsonl', joined)) == (TEXTS, [])  # files that were put together
    rows[6] = rows[6][:-9]
    documents, notes = read(write(tmp_path / 'a.json', '[\n' + ',\n'.join(rows) + '\n]'))
    assert documents == TEXTS[:6] + TEXTS[7:]
    assert notes == ['1 rows were no JSON (first: line 8)']
    documents, notes = read(write(tmp_path / 'a.json', json.dumps(ROWS)[:-30]))
    assert documents == TEXTS[:29] and notes == ['stopped after 29 documents: truncated']
    random_rows = ''.join(json.dumps({'text': f'{random.random()} bread and tea'}) + '\n' for _ in range(3000))
    packed = gzip.compress(random_rows.encode())
    documents, notes = read(write(tmp_path / 'a.jsonl.gz', packed[:-500]))
    assert len(documents) > 2000 and notes == [f'stopped after {len(documents):,} documents: truncated']
    small = gzip.compress(lines(*ROWS).encode()) + b'no part of it'
    assert read(write(tmp_path / 'a.jsonl.gz', small))[0] == TEXTS
    documents, notes = read(write(tmp_path / 'a.jsonl.gz', packed + b'no part of it'))
    assert len(documents) == 3000 and notes == ['stopped after 3,000 documents: unreadable (BadGzipFile)']


def test_a_folder_of_objects(tmp_path):
    def documents(**options):
        options = OPTIONS | options
        sources = [Source(str(path), 'data', 1, 0) for path in sorted(tmp_path.iterdir())]
        kept, plans, _ = survey.survey(sources, options)
        return [text for source, plan in zip(kept, plans)
                for text, last in isolate.read(source, options | plan, Notes()) if text]
    for i in range(9):
        page = {'title': f'Page {i}', 'text': TEXTS[i] * 3, **({'note': 'Old.'} if i % 2 else {})}
        write(tmp_path / f'{i}.json', json.dumps(page, indent=1))
    assert documents() == [text * 3 for text in TEXTS[:9]]
    assert documents(text_column='title')[:2] == ['Page 0', 'Page 1']
    settings = [json.dumps({'name': f'part {i}', 'description': TEXTS[i] * 3}) for i in range(9)]
    for i, content in enumerate(settings):
        write(tmp_path / f'{i}.json', content)
    assert documents() == settings
    write(tmp_path / '0.json', '{"text": "one of its kind"}')
    assert documents()[0] == '{"text": "one of its kind"}'


def test_parts_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(json_look, 'PART_BYTES', 300)
    rows = [json.dumps({'text': 'naïve ' * (i % 60) + str(i)}, ensure_ascii=False) for i in range(200)]
    rows[77] = '{"broken'
    path = str(write(tmp_path / 'a.jsonl', '\ufeff' + '\n'.join(rows)))
    (source,), (plan,), _ = survey.survey([Source(path, 'jsonl', 1, 0, False)], OPTIONS)
    assert len(plan['parts']) > 20
    whole, notes = read(path)
    parts, in_parts = [], Notes()
    for part in plan['parts']:
        parts += [text for text, _ in isolate.read(source, OPTIONS | plan | {'part': part}, in_parts)]
    assert parts == whole and len(whole) == 199
    assert list(in_parts.lost) == ['lines were no JSON (first: line 78)']
    for cut in 150, 301:  # a part begins with the first line that begins in it
        two = [[0, cut], [cut, plan['parts'][-1][1]]]
        assert whole == [
            text for part in two for text, _ in isolate.read(source, OPTIONS | plan | {'part': part}, Notes())]


def test_damage_in_a_packed_file_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(json_look, 'UNPACKED', 1)
    monkeypatch.setattr(files, 'CHUNK', 999)
    rows = b''.join(b'{"text": "Bread %d and tea."}\n' % i for i in range(90))
    for bad, said in ('é'.encode(), []), (b'\xff', ['1 bytes were no UTF-8']), ('\ufffd'.encode(), []):
        packed = gzip.compress(rows + b'{"text": "na' + bad + b've"}\n')
        documents, notes = read(write(tmp_path / 'a.jsonl.gz', packed))
        assert documents[-1] == 'na' + bad.decode('utf-8', 'replace') + 've' and notes == said


def test_rows_as_they_stand(tmp_path):
    text = lines({'id': 1, 'b': 'x'}, {'b':  'y'})
    assert read(write(tmp_path / 'a.jsonl', text), text_column='*')[0] == text.split('\n')[:2]
    assert read(write(tmp_path / 'a.json', json.dumps(ROWS)), text_column='*')[0] == [
        json.dumps(row) for row in ROWS]
