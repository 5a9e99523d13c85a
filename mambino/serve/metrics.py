"""What is counted while the server runs, in the text that Prometheus reads.

    metrics = Metrics()
    metrics.add('generated_tokens', 120)        # a counter
    metrics.observe('first_token', 0.08)        # a histogram, in seconds
    metrics.text(library)                       # # TYPE mambino_generated_tokens_total counter …
"""
import threading
import time

from mambino.machine import memory_used

COUNTERS = {
    'prompt_tokens': 'Tokens of prompts',
    'cached_tokens': 'Tokens of prompts that were not read again, since a state was kept',
    'generated_tokens': 'Tokens of answers',
    'models_loaded': 'Models that were loaded',
}
HISTOGRAMS = {
    'first_token': 'Seconds from a request to the first token of its answer',
    'between_tokens': 'Seconds from a token to the next one of the same answer',
    'answer': 'Seconds from a request to the end of its answer',
}
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
# the paths that are counted by name: one that a client makes up must not fill the memory
PATHS = {'/v1/models', '/v1/completions', '/v1/chat/completions', '/v1/responses', '/health', '/tokenize',
         '/detokenize', '/tokenizer_info', '/score', '/sessions', '/metrics', '/'}
PREFIXES = ('/v1/models/', '/sessions/')
METHODS = {'GET', 'HEAD', 'POST', 'DELETE', 'OPTIONS', 'PUT', 'PATCH'}


class Metrics:
    """See the top of the file. Any thread may count."""

    def __init__(self):
        self.lock = threading.Lock()
        self.began = time.time()
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.requests = {}                                  # {(method, path, status): how many}
        self.buckets = {name: [0] * (len(BUCKETS) + 1) for name in HISTOGRAMS}
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def add(self, name, number=1):
        with self.lock:
            self.counters[name] += number

    def observe(self, name, seconds):
        place = next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
        with self.lock:
            self.buckets[name][place] += 1
            self.sums[name] += seconds

    def count_request(self, scope, status):
        """A response has ended; status 0: its client left before it began."""
        method = scope['method'] if scope['method'] in METHODS else 'other'
        key = method, known(scope['path']), status
        with self.lock:
            self.requests[key] = self.requests.get(key, 0) + 1

    def text(self, library):
        """All of it, with how the models of a library are now."""
        lines = []
        with self.lock:
            for name, text in COUNTERS.items():
                head(lines, f'{name}_total', 'counter', text)
                lines.append(f'mambino_{name}_total {self.counters[name]}')
            head(lines, 'requests_total', 'counter', 'HTTP requests; status 0: the client left before the answer')
            for (method, path, status), number in sorted(self.requests.items()):
                labels = f'method="{method}",path="{path}",status="{status}"'
                lines.append(f'mambino_requests_total{{{labels}}} {number}')
            for name, text in HISTOGRAMS.items():
                self.histogram(lines, name, text)
        self.gauges(lines, library)
        return '\n'.join(lines) + '\n'

    def histogram(self, lines, name, text):
        head(lines, f'{name}_seconds', 'histogram', text)
        total = 0
        for bound, number in zip((*BUCKETS, '+Inf'), self.buckets[name]):
            total += number
            lines.append(f'mambino_{name}_seconds_bucket{{le="{bound}"}} {total}')
        lines.append(f'mambino_{name}_seconds_sum {self.sums[name]:.6f}')
        lines.append(f'mambino_{name}_seconds_count {total}')

    def gauges(self, lines, library):
        """What is so now: of each model that is loaded what its scheduler says, and of the process."""
        by_name = {}                                        # {name of a number: {model: it}}
        for model, scheduler in library.schedulers().items():
            stats = dict(scheduler.stats(), alive=int(scheduler.is_alive()))
            for name, value in stats.items():
                if isinstance(value, (int, float)):
                    by_name.setdefault(name, {})[model] = value
        for name, values in sorted(by_name.items()):
            head(lines, f'model_{name}', 'gauge', f'{name.replace("_", " ")}, of each model that is loaded')
            for model, value in values.items():
                lines.append(f'mambino_model_{name}{{model="{escaped(model)}"}} {value}')
        head(lines, 'process_resident_bytes', 'gauge', 'Memory of the process')
        lines.append(f'mambino_process_resident_bytes {memory_used("cpu") or 0}')
        head(lines, 'process_start_seconds', 'gauge', 'When the process began, in seconds since 1970')
        lines.append(f'mambino_process_start_seconds {self.began:.3f}')


def head(lines, name, kind, text):
    lines.append(f'# HELP mambino_{name} {text}')
    lines.append(f'# TYPE mambino_{name} {kind}')


def known(path):
    """A path as it is counted."""
    if path in PATHS:
        return path
    return next((prefix + '…' for prefix in PREFIXES if path.startswith(prefix)), 'other')


def escaped(text):
    """A text as the value of a label."""
    return text.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')
