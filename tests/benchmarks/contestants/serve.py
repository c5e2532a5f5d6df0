"""Serve: the loop of a contestant. Standard library only, since it runs in the environment of every peer.

A task is a function of its options that prepares all that is not measured and returns a function of nothing, which is.
"""

import json
import os
import resource
import sys
import time


def serve(tasks):
    """Run the task of the command line once a line of standard input; an answer is one line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    run = tasks[sys.argv[1]](**json.loads(sys.argv[2]))
    before = _memory("VmRSS")
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        _forget_peak()
        wall, cpu = time.perf_counter(), _cpu()
        value = run()
        cost = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu}
        print(json.dumps({**cost, "peak": _memory("VmHWM") - before, "value": value}), file=answers, flush=True)


def _cpu():
    """CPU-seconds of all threads, of child processes that ended, and of those that run, with theirs."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(map(_spent, descendants(os.getpid())))


def descendants(process):
    """Numbers of the processes that a process has started, and of those that these have; none where there is no /proc."""
    children = {}
    for folder in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        fields = _stat(folder) if folder.isdigit() else []
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder))
    found = list(children.get(process, []))
    for number in found:
        found += children.get(number, [])
    return found


def _spent(process):
    """CPU-seconds of a process and of its children that ended."""
    return sum(map(int, _stat(process)[11:15])) / os.sysconf("SC_CLK_TCK")


def _stat(process):
    """What /proc says of a process after its name; nothing of one that has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _memory(field):
    """MiB of this process, by a field of /proc; the peak so far where there is none."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024
    except FileNotFoundError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _forget_peak():
    """Start the peak anew, so that earlier turns and imports do not count."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        pass
