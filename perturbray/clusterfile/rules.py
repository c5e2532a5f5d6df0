"""What Ray's launcher accepts in a cluster file and a sweep would suffer from. A rule is a function in RULES."""

import re
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from perturbray.clusterfile.aws import WITH_GPU
from perturbray.clusterfile.file import PLACEHOLDER, ClusterFile, Finding, join, mapping
from perturbray.errors import nearest

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN = "~/.ray/auth_token"
MAKE_TOKEN = 'python -c "import secrets; print(secrets.token_hex(32))" > auth_token && chmod 600 auth_token'
SHORTEST_TOKEN = 32  # characters; 16 random bytes in hex
DEFAULT_WORKERS = 2  # Ray's own max_workers


def placeholders(file: ClusterFile) -> Iterator[Finding]:
    """What is still to be filled in, each once: an anchor of YAML repeats it."""
    seen = set()
    for path, text in file.strings():
        for name in PLACEHOLDER.findall(text):
            if name not in seen:
                yield Finding(path, f"{name} is still to be filled in; the file's header says with what")
            seen.add(name)


def node_types(file: ClusterFile) -> Iterator[Finding]:
    """Workers can start, and the head, whose loss ends a sweep, neither runs trials nor goes away."""
    head = file.head
    if file.kind == "local" or head not in file.node_types:  # Ray says so itself
        return
    path = join("available_node_types", head)
    resources = mapping(file.node_types[head].get("resources"))
    starts = " ".join(text for _, text in file.starts("head"))
    if resources.get("CPU") != 0 and "--num-cpus=0" not in starts:
        yield Finding(
            f"{path}.resources",
            "trials would run on the head, and take the sweep with them when its memory runs out: CPU: 0",
        )
    if _spot(file.node_types[head]):
        yield Finding(f"{path}.node_config", "a head on spot ends the sweep when it is taken away: on demand")
    for name, kind in file.workers.items():
        if kind.get("max_workers") == 0:
            yield Finding(f"{join('available_node_types', name)}.max_workers", "0: no worker of this type ever starts")
    if not file.workers or file.config.get("max_workers") == 0:
        yield Finding("max_workers", "no worker can start, and the head runs no trials: give a node type and a number")
    elif "max_workers" not in file.config:
        yield Finding("max_workers", f"not given: Ray starts {DEFAULT_WORKERS} workers at most", warning=True)


def gpus(file: ClusterFile) -> Iterator[Finding]:
    """A type with a GPU and an image that can use it go together."""
    if file.kind != "aws" or not file.workers:
        return
    having = [
        name
        for name, kind in file.workers.items()
        if mapping(kind.get("resources")).get("GPU")
        or WITH_GPU.match(str(mapping(kind.get("node_config")).get("InstanceType")))
    ]
    cuda = bool(re.search(r"gpu|-cu\d|cuda", file.image))
    if not having:
        asked = f" which the image {file.image} is made for" if cuda else ""
        yield Finding(
            "available_node_types",
            f"no type of worker has a GPU,{asked or ' so that trials run on CPUs'}",
            warning=True,
        )
    elif file.image and not cuda:
        yield Finding(
            "docker.image", f"{file.image} has no CUDA for the GPUs of {', '.join(having)}: one that ends in -gpu"
        )


def token(file: ClusterFile) -> Iterator[Finding]:
    """The secret exists, is read by its owner alone, and reaches every node."""
    mounts = {there: here for there, here in file.file_mounts.items() if there.endswith("/.ray/auth_token")}
    if not mounts:
        yield Finding(
            "file_mounts", f"no node gets the token, without which Ray refuses to start: {TOKEN}: ./auth_token"
        )
    for there, here in mounts.items():
        path, place = join("file_mounts", there), file.source(here)
        if not place.is_file():
            yield Finding(path, f"{place} is no file; make the token: {MAKE_TOKEN}")
            continue
        length, rights = len(place.read_bytes().strip()), stat.S_IMODE(place.stat().st_mode)
        if not length:
            yield Finding(path, f"{place} is empty; make the token: {MAKE_TOKEN}")
        elif length < SHORTEST_TOKEN:
            yield Finding(
                path, f"{place} holds {length} characters, which can be guessed; make the token: {MAKE_TOKEN}"
            )
        if rights & 0o077:
            yield Finding(path, f"{place} can be read by others ({rights:04o}): chmod 600 {place}")


def sources(file: ClusterFile) -> Iterator[Finding]:
    """What is to be copied to the nodes is there."""
    for there, here in file.file_mounts.items():
        if not there.endswith("/.ray/auth_token") and not file.source(here).exists():
            yield Finding(
                join("file_mounts", there),
                f"{file.source(here)} does not exist; paths are from where `ray up` is called",
            )


def starts(file: ClusterFile) -> Iterator[Finding]:
    """Head and workers start with the token, find each other, and show nothing to strangers."""
    port = "6379"
    for role in ("head", "worker"):
        section = f"{role}_start_ray_commands"
        commands = file.starts(role)
        if not commands:
            yield Finding(
                section, "no `ray start`: Ray would fill in its own, without the token and with an open dashboard"
            )
        mode = _environment(file.run_options(role)).get("RAY_AUTH_MODE")
        for path, text in commands:
            said = re.findall(r"\bRAY_AUTH_MODE=(\S+)", text)
            if (said[-1] if said else mode) != "token":
                yield Finding(path, "Ray would start without authentication: RAY_AUTH_MODE=token ray start ...")
            if "--ray-debugger-external" in text:
                yield Finding(path, "--ray-debugger-external lets strangers run code: leave it out")
            if role == "head":
                port = _option(text, "port") or port
                yield from _head_start(path, text)
            else:
                address = _option(text, "address") or ""
                if address != f"$RAY_HEAD_IP:{port}":
                    yield Finding(
                        path, f"--address={address} is not where the head listens: --address=$RAY_HEAD_IP:{port}"
                    )


def _head_start(path: str, text: str) -> Iterator[Finding]:
    host = _option(text, "dashboard-host")
    if host and host not in LOOPBACK:
        yield Finding(
            path,
            f"--dashboard-host={host} offers job submission to the network: 127.0.0.1, and `ray dashboard` to reach it",
        )
    if _option(text, "autoscaling-config") is None:
        yield Finding(path, "workers would never start: --autoscaling-config=~/ray_bootstrap_config.yaml")


def storage(file: ClusterFile) -> Iterator[Finding]:
    """Results and the screen, once read, lie where all nodes see them: PERTURBRAY_CACHE is on something mounted."""
    commands = [text for _, text in file.commands("initialization_commands", "setup_commands")]
    mounting = [text for text in commands if re.search(r"\bmount\s", text)]
    if not file.image:
        said = file.commands("setup_commands", "head_start_ray_commands")
        if not any("PERTURBRAY_CACHE=" in text for _, text in said):
            yield Finding("setup_commands", f"PERTURBRAY_CACHE is not set: {_STORAGE}")
        elif file.kind != "local" and not mounting:
            yield Finding("initialization_commands", f"nothing is mounted: {_STORAGE}")
        return
    for words, role in {tuple(file.run_options(role)): role for role in ("head", "worker")}.items():
        cache = _environment(words).get("PERTURBRAY_CACHE")
        if not cache:
            yield Finding("docker.run_options", f"PERTURBRAY_CACHE is not set on a {role}: {_STORAGE}")
            continue
        holding = {there: here for there, here in _volumes(words).items() if PurePosixPath(cache).is_relative_to(there)}
        if not holding:
            yield Finding(
                "docker.run_options",
                f"{cache} lies in a {role}'s container, where no other node sees it: {_STORAGE}",
            )
        for here in holding.values():
            if not any(re.search(rf"\bmount\s.*{re.escape(here)}(\s|$)", text) for text in mounting):
                yield Finding("initialization_commands", f"nothing is mounted at {here} of a {role}: {_STORAGE}")


_STORAGE = (
    "mount a file system that all nodes see, hand it to the container with -v, and let PERTURBRAY_CACHE lie on it"
)


def versions(file: ClusterFile) -> Iterator[Finding]:
    """Jobs are pickled here and unpickled there: the same Python and Ray."""
    if not file.image:
        return
    found = re.search(r":(\d+\.\d+\.\d+)\S*-py(\d)(\d+)", file.image)
    if not found:
        yield Finding(
            "docker.image", f"{file.image} does not say its versions of Ray and Python in its tag", warning=True
        )
        return
    there, python = found[1], f"{found[2]}.{found[3]}"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if there != version("ray"):
        yield Finding(
            "docker.image", f"Ray {there} there and {version('ray')} here: install ray=={there}", warning=True
        )
    if python != here:
        yield Finding(
            "docker.image",
            f"Python {python} there and {here} here; an image with py{here.replace('.', '')}",
            warning=True,
        )


def own_machines(file: ClusterFile) -> Iterator[Finding]:
    """Machines that one already has: their addresses, the key that reaches them, and the autoscaler that starts them."""
    if file.kind != "local":
        return
    workers, head = file.provider.get("worker_ips"), file.provider.get("head_ip")
    if not workers:
        yield Finding("provider.worker_ips", "no workers: list their addresses")
    elif isinstance(workers, list) and head in workers:
        yield Finding("provider.worker_ips", f"{head} is the head, which runs trials too: leave it out")
    if not any("RAY_enable_autoscaler_v2=0" in text for _, text in file.starts("head")):
        yield Finding(
            "head_start_ray_commands",
            "the second autoscaler, the default of `ray up`, starts no workers of provider local: RAY_enable_autoscaler_v2=0 "
            "before `ray start`, and call RAY_UP_enable_autoscaler_v2=0 ray up",
        )


def ssh_key(file: ClusterFile) -> Iterator[Finding]:
    """The key is there, and ssh takes it."""
    given = mapping(file.config.get("auth")).get("ssh_private_key")
    if file.kind == "local" and not given:
        yield Finding("auth.ssh_private_key", "without it the head has no key to start the workers with: name one")
    if not given or PLACEHOLDER.search(str(given)):
        return
    place = Path(str(given)).expanduser()
    if not place.is_file():
        near = [str(path.with_suffix("")) for path in place.parent.glob("*.pub")] if place.parent.is_dir() else []
        yield Finding("auth.ssh_private_key", f"{place} is no file; {nearest(str(place), near)}")
    elif stat.S_IMODE(place.stat().st_mode) & 0o077:
        yield Finding("auth.ssh_private_key", f"ssh refuses a key that others can read: chmod 600 {place}")


def project(file: ClusterFile) -> Iterator[Finding]:
    if file.kind == "gcp" and not file.provider.get("project_id"):
        yield Finding("provider.project_id", "not given: the id of the project in Google Cloud")


RULES = (placeholders, node_types, gpus, token, sources, starts, storage, versions, own_machines, ssh_key, project)


def _spot(kind: dict) -> bool:
    market = mapping(mapping(kind.get("node_config")).get("InstanceMarketOptions"))
    return market.get("MarketType") == "spot"


def _option(command: str, name: str) -> str | None:
    """The value of ``--name=value`` or ``--name value`` in a command."""
    found = re.findall(rf"--{name}(?:=|\s+)(\S+)", command)
    return found[-1] if found else None


def _valued(words: Sequence[str], *names: str) -> list[str]:
    """Values of the options called ``names``, written ``-e X`` or ``--env=X``."""
    found = []
    for number, word in enumerate(words):
        if word in names and number + 1 < len(words):
            found.append(words[number + 1])
        found += [word.removeprefix(f"{name}=") for name in names if word.startswith(f"{name}=")]
    return found


def _environment(words: Sequence[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in _valued(words, "-e", "--env") if "=" in text)


def _volumes(words: Sequence[str]) -> dict[str, str]:
    """Folder of the host by its folder in the container."""
    found = {}
    for text in _valued(words, "-v", "--volume"):
        here, _, there = text.partition(":")
        found[there.split(":")[0]] = here
    for text in _valued(words, "--mount"):
        parts = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
        here, there = parts.get("source") or parts.get("src"), parts.get("target") or parts.get("dst")
        if here and there:
            found[there] = here
    return found
