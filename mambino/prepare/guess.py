"""The likely encoding of bytes that say nothing of it."""
import codecs
import re

# what cp1252 has for Western Europe; other languages' bytes, read as cp1252, also hit superscripts,
# eth and thorn
WESTERN = ('€‚„…‘’“”•–—™œŒ¡£§©«®°´·»¿\xa0'
           'àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜ').encode('cp1252')


def wide_encoding(head):
    """utf-16-le, utf-16-be or None: the zeros of ASCII letters, or only of spaces, lie on one side.
    """
    sample = head[:1 << 16]
    even = sample[::2].count(0)
    odd = sample[1::2].count(0)
    if min(even, odd) > 0.05 * max(even, odd) or even == odd:
        return None
    encoding = 'utf-16-le' if odd > even else 'utf-16-be'
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    readable = sum(c.isspace() or c.isprintable() for c in text)
    return encoding if text and readable > 0.97 * len(text) else None


def encoding_of_lines(lines):
    """The likely encoding of lines that are not UTF-8, or None. cp1252 where it reads as Western
    European.
    """
    sample = b'\n'.join(lines)
    high_runs = re.findall(rb'[\x80-\xff]+', sample)
    high = sum(map(len, high_runs))
    # Western accents stand alone; Cyrillic or Greek does not
    in_words = sum(len(letters) for letters in high_runs if len(letters) >= 3)
    strange = len(b''.join(high_runs).translate(None, WESTERN))
    if high <= 2 + 0.3 * len(sample) and in_words <= 0.1 * high and strange <= 0.03 * high:
        return 'cp1252'
    try:
        from charset_normalizer import from_bytes  # comes with tiktoken, which asks for requests
    except ImportError:
        return None
    best = from_bytes(sample).best()
    return best.encoding.replace('koi8_', 'koi8-') if best else None
