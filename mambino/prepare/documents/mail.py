"""Reads mail: a message in a file, or a mailbox of many.

    for text, last in mail.read_mail('letters.mbox', options, notes): ...    # a document a message

    a message ──► From, To, Date, Subject
               ├► its plain text, or what its HTML shows where there is none
               └► attachments: counted in the notes
"""
import email
import email.errors
import email.header
import re

from mambino.prepare.documents.webpage import text_of
from mambino.prepare.files import Notes, Skip, open_bytes
from mambino.prepare.texts.declared import codec_of
from mambino.prepare.texts.encodings import MOST_WRONG, decoded
from mambino.prepare.texts.evidence import count_wrong

HEADERS = ('From', 'To', 'Date', 'Subject')
# the line before each message of a mailbox: who, and when to the minute
BEGINS = re.compile(rb'From \S.*(?:\d:\d\d.*\d{4}|\d{4}.*\d:\d\d)')
LARGEST = 1 << 28  # bytes of a message, attachments and all
HEADER = re.compile(rb'[!-9;-~]+:')
MUCH_MORE = 4  # times the plain text: then the HTML of a message is not the same again


def read_mail(path, options, notes):
    """A document a message."""
    attachments = 0
    own_notes = Notes()
    with open_bytes(path) as f:
        for data in messages_of(f):
            if data is None:
                notes.lose(1, f'messages are larger than {LARGEST >> 20} MB')
                continue
            message = email.message_from_bytes(data)
            body, left_out = body_of(message, own_notes)
            attachments += left_out
            if not body.strip() and message.get_content_type() in ('multipart/encrypted', 'application/pkcs7-mime'):
                notes.lose(1, 'messages are encrypted')
                continue
            is_page = message.get_content_type() == 'multipart/related' and 'To' not in message  # saved by a browser
            yield ('' if is_page else head_of(message)) + body.strip('\n') + '\n', True
    if attachments:
        notes.append(f'{attachments:,} attachments left out')
    notes += summed(own_notes)


def summed(notes):
    """Of notes that say alike of many messages one each."""
    groups = {}
    for note in notes:
        number, words = re.match(r'(?:([\d,]+) )?(.*)', note, re.S).groups()
        what = re.split(', as in |, one in ', words)[0]
        groups.setdefault(what, []).append([note, int((number or '0').replace(',', ''))])
    lines = []
    for what, group in groups.items():
        first, number = group[0]
        total = sum(n for _, n in group)
        if len(group) == 1:
            lines.append(first)
        else:
            lines.append(f'{total:,} {what}' if number else f'{first} (and {len(group) - 1:,} more like it)')
    return lines


def messages_of(stream):
    """Yields the bytes of each message; None for one that is too large. The stream is a mailbox where
    its first line is that of one.
    """
    first = stream.readline(1 << 16)
    if not BEGINS.match(first):
        data = first + stream.read(LARGEST + 1)
        if not any(HEADER.match(line) for line in data[:1 << 16].splitlines()[:20]):
            raise Skip('no mail')
        yield data if len(data) <= LARGEST else None
        return
    lines = []
    size = 0
    is_blank = True
    while line := stream.readline(1 << 20):
        if is_blank and line.startswith(b'From ') and BEGINS.match(line):
            yield b''.join(lines) if size <= LARGEST else None
            lines = []
            size = 0
        elif size <= LARGEST:
            lines.append(line[1:] if re.match(b'>+From ', line) else line)
            size += len(line)
        is_blank = not line.strip()
    yield b''.join(lines) if size <= LARGEST else None


def head_of(message):
    """The lines that say who wrote to whom, when, about what; an empty line after them."""
    lines = [f'{name}: {header}' for name in HEADERS if (header := header_of(message, name))]
    return '\n'.join(lines) + '\n\n' if lines else ''


def header_of(message, name):
    """A header as it is read, on one line; '' without it."""
    value = next((value for key, value in message.raw_items() if key.lower() == name.lower()), '')
    data = value.encode('utf-8', 'surrogateescape')  # some write bytes there, against the rules
    value = text_found(data, Notes())
    try:
        value = str(email.header.make_header(email.header.decode_header(value)))
    except (ValueError, LookupError, email.errors.HeaderParseError):
        pass
    value = ' '.join(value.split())
    return re.sub(' ?<[^<>]*@[^<>]*>', '', value) or value if name in ('From', 'To') else value


def body_of(part, notes):
    """(text of a message or of a part of one, how many attachments were left out)"""
    kind = part.get_content_type()
    if kind == 'message/rfc822' and part.is_multipart():
        inner = part.get_payload(0)
        text, left_out = body_of(inner, notes)
        return head_of(inner) + text, left_out
    if part.is_multipart():
        parts = [(inner.get_content_type(), *body_of(inner, notes)) for inner in part.get_payload()]
        left_out = sum(n for _, _, n in parts)
        texts = [text for _, text, _ in parts if text.strip()]
        if kind == 'multipart/alternative' and texts:
            plain = [text for inner, text, _ in parts if inner == 'text/plain' and text.strip()]
            is_summary = plain and MUCH_MORE * len(plain[0]) < len(max(texts, key=len))
            return max(texts, key=len) if is_summary else (plain or texts)[0], left_out
        if kind == 'multipart/related':
            left_out = 0  # pictures and styles of a page
        return '\n\n'.join(text.strip('\n') for text in texts), left_out
    if kind.startswith('multipart/'):  # of which no part begins
        kind = 'text/plain'
    if kind not in ('text/plain', 'text/html') or part.get_content_disposition() == 'attachment':
        return '', 1
    text = text_in(part, kind, notes)
    return text_of(text, title=False) if kind == 'text/html' else text, 0


def text_in(part, kind, notes):
    """The text of a part, in the encoding that it says, if it fits, or else in the one found."""
    data = part.get_payload(decode=True) or b''
    name = codec_of(part.get_content_charset() or '') or 'ascii'
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError):
        pass
    wrong = count_wrong(lambda: iter([data]), name)
    if name not in ('ascii', 'utf-8') and wrong.share <= MOST_WRONG:
        wrong.say(notes)
        return data.decode(name, 'replace')
    return text_found(data, notes, 'html' if kind == 'text/html' else 'text')


def text_found(data, notes, kind='text'):
    """The text in bytes that do not say their encoding."""
    try:
        return decoded(data, notes, kind=kind)
    except Skip:
        count_wrong(lambda: iter([data]), 'utf-8').say(notes)
        return data.decode('utf-8', 'replace')
