"""The part `sanitizer`: compute-sanitizer's memcheck over a step of the smallest models, where it
is installed."""
import os
import shutil
import subprocess
import sys

from mambino.bench.gpu.running import ROOT

STEP = ('from mambino.bench.gpu import models; '
        'training = models.Training(models.small_model({name!r}).to("cuda"), "cuda", "bfloat16", 1, 64); '
        'training.micro_step(); training.update(); models.synchronize("cuda")')


def run(recorder, device, out_dir):
    tool = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'
    if not os.path.exists(tool) or not device.startswith('cuda'):
        recorder.add('memcheck', 'left out: there is no compute-sanitizer')
        return
    for name in ('gpt', 'mamba-2'):
        with recorder.item(name, 20) as wanted:
            if wanted:
                done = subprocess.run([tool, '--tool', 'memcheck', '--error-exitcode', '9',
                                       sys.executable, '-c',
                                       STEP.format(name=name)], capture_output=True, text=True,
                                      cwd=ROOT,
                                      timeout=recorder.seconds_left())
                last = [line for line in done.stdout.splitlines() if 'ERROR SUMMARY' in line]
                recorder.add(name, (last or [done.stderr[-200:]])[-1], passed=done.returncode == 0)
