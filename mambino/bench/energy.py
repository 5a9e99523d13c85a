"""Energy that the processor took, by the counters of Linux (powercap; often root alone reads them).

    before = counters()
    …
    joules(before, counters())      # None where the machine does not tell
"""
import os
import re

from mambino.machine import number_in

FOLDER = '/sys/class/powercap'


def counters(folder=FOLDER):
    """{package: (microjoules, after how many it begins at 0)}; {} where none can be read."""
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(r'intel-rapl:\d+', name):      # AMD's, too; parts of one end in :0:0
            found[name] = tuple(number_in(os.path.join(folder, name, which))
                                for which in ('energy_uj', 'max_energy_range_uj'))
    return {} if any(None in numbers for numbers in found.values()) else found


def joules(before, after):
    """Between two readings, in which no counter has begun anew more than once: with 100 W in some 40
    minutes."""
    if not before or before.keys() != after.keys():
        return None
    spent = [(after[name][0] - so_far) % (most + 1) for name, (so_far, most) in before.items()]
    return sum(spent) / 1e6
