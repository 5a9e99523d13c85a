"""What an encoding is called, and where a text says its own.

    codec_of('gb2312')                                  # 'gb18030', as browsers take it
    declared(b'<meta charset="Shift_JIS">')             # 'cp932'

Names are taken as browsers do: who writes gb2312 may use all of GBK, and what says iso-8859-1 is cp1252.
"""
import codecs
import difflib
import re
from encodings.aliases import aliases

from mambino.configurator import fail

HEAD = 4096  # bytes at the beginning in which a text says its encoding
TAIL = 2048  # and at its end, where editors look for their settings

# what browsers take for another, mostly larger one: https://encoding.spec.whatwg.org/#names-and-labels
LABELS = {
    'gb18030': 'gb2312 gb_2312 gb_2312_80 gb2312_80 gbk x_gbk cp936 ms936 936 euc_cn x_euc_cn chinese csgb2312 '
               'iso_ir_58 hz_gb_2312',
    'cp950': 'big5 big5_tw csbig5 x_x_big5 cn_big5 ms950',
    'big5hkscs': 'big5_hkscs hkscs',
    'cp932': 'shift_jis sjis s_jis shiftjis x_sjis ms_kanji ms932 windows_31j csshiftjis',
    'euc_jp': 'eucjp ujis u_jis x_euc_jp cseucpkdfmtjapanese euc_jp_ms eucjp_win eucjp_ms',
    'cp949': 'euc_kr euckr ks_c_5601_1987 ks_c_5601_1989 ks_c_5601 ksc5601 ksc_5601 korean cseuckr iso_ir_149 '
             'uhc ms949 windows_949 ks_x_1001 ksx1001',
    'cp1252': 'iso_8859_1 iso8859_1 iso88591 8859_1 latin_1 latin1 latin l1 ascii us_ascii us ansi_x3_4_1968 '
              'iso_ir_100 cp819 ibm819 csisolatin1 x_cp1252 ansi ansinew win1252',
    'cp1254': 'iso_8859_9 iso8859_9 iso88599 latin5 l5 iso_ir_148 csisolatin5 x_cp1254',
    'cp874': 'iso_8859_11 iso8859_11 iso885911 tis_620 tis620 dos_874 windows_874 thai',
    'cp1251': 'x_cp1251 win1251 win_1251',
    'cp1250': 'x_cp1250 win1250',
    'cp1253': 'x_cp1253',
    'cp1255': 'x_cp1255',
    'cp1256': 'x_cp1256',
    'cp1257': 'x_cp1257',
    'cp1258': 'x_cp1258',
    'cp866': 'ibm866 866 csibm866 dos866',
    'koi8-r': 'koi koi8 koi8_r koi8r cskoi8r',
    'koi8-u': 'koi8_ru koi8_u koi8u',
    'iso8859-8': 'iso_8859_8_i iso_8859_8_e iso_8859_8 hebrew logical visual',
    'iso8859-15': 'iso_8859_15 iso8859_15 latin9 latin_9 l9 csisolatin9',
    'mac-roman': 'macintosh mac x_mac_roman csmacintosh applemac macroman',
    'mac-cyrillic': 'x_mac_cyrillic x_mac_ukrainian',
    'mac-latin2': 'x_mac_ce maccentraleurope macce',
    'utf-8': 'unicode_1_1_utf_8 unicode11utf8 unicode20utf8 x_unicode20utf8 utf8 utf8x utf_8 utf8mb4 utf8mb3',
}
CODECS = {label: codec for codec, labels in LABELS.items() for label in labels.split()}
NO_ENCODING = {'idna', 'punycode', 'undefined', 'unicode_escape', 'raw_unicode_escape', 'mbcs', 'oem'}

NAME = rb'([A-Za-z0-9][\w.:-]*)'
PAGE = re.compile(rb'<meta\s[^>]*?charset\s*=\s*["\']?\s*' + NAME, re.I)
COMMENT = re.compile(rb'<!--.*?-->', re.S)
# XML and CSS begin with it; gettext, mail and HTTP say charset=; Python, Ruby, Emacs and vim coding: or
# fileencoding=; LaTeX \usepackage[latin1]{inputenc}; SQL dumps SET NAMES
PLACES = [
    re.compile(rb'^\s*<\?xml\s[^>]*?encoding\s*=\s*["\']' + NAME),
    re.compile(rb'^@charset\s+"' + NAME),
    re.compile(rb'charset\s*=\s*\\?["\']?' + NAME, re.I),
    re.compile(rb'\\usepackage\s*\[([^\]]+)\]\s*\{inputenc\}'),
    re.compile(rb'\bSET\s+(?:NAMES|client_encoding\s*=)\s*["\']?' + NAME, re.I),
]
COOKIE = re.compile(rb'(?:coding\s*[:=]|\bfenc=|\buse\s+encoding\b)\s*["\']?' + NAME, re.I)


def codec_of(label):
    """The name of Python's codec for an encoding, as browsers take it; None where it is none of text."""
    name = re.sub(r'[^a-z0-9]+', '_', label.strip().lower())
    if name in CODECS:
        return CODECS[name]
    name = re.sub('^(x_|cs)?(cp|ibm|windows|win|dos)_?', 'cp', name)
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    if not codec._is_text_encoding or name in NO_ENCODING:
        return None
    return codec.name


def check_encoding(label):
    """Ends the program if the setting `encoding` is none that is known, naming the nearest ones."""
    if label and codec_of(label) is None:
        names = sorted(name for name in {*CODECS.values(), *aliases.values()} if codec_of(name))
        near = difflib.get_close_matches(label.lower().replace('-', '_'), names, n=3, cutoff=0)
        fail(f'encoding={label}: no such encoding; the nearest are {", ".join(near)}')


def declared(head, tail=b'', kind='text'):
    """The codec of the encoding that a text says it has, of its first HEAD and last TAIL bytes; None
    where it says nothing, or what cannot be, or UTF-8.
    """
    for label in labels_in(head[:HEAD], tail[-TAIL:], kind):
        codec = codec_of(label.decode('ascii', 'replace'))
        if codec and codec != 'utf-8' and is_ascii_like(codec):
            return codec
    return None


def labels_in(head, tail, kind):
    """Yields what may be the names of encodings, the surest first."""
    if kind == 'html':
        head = COMMENT.sub(b'', head)
        yield from PAGE.findall(head)
    for place in PLACES:
        yield from place.findall(head)
    lines = head.split(b'\n')[:2] + tail.split(b'\n')[-10:]
    for line in lines:
        yield from COOKIE.findall(line)


def is_ascii_like(codec):
    """Whether ASCII is itself in it: else the declaration could not have been read."""
    try:
        return b'<a b="c">\n'.decode(codec) == '<a b="c">\n'
    except ValueError:
        return False
