"""Started in a network namespace of its own by test_open_ports: `ADDRESS COMMAND` starts a head and says what listens there.

Prints a JSON object: the listening sockets as (port, address), the ports of a worker process, and what each port answers
to a request without the token.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import grpc
import ray

CALLS = {  # a method of the service at each port; a body of nothing is valid everywhere
    6379: "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    6380: "ray.rpc.NodeManagerService/GetNodeStats",
    6381: "ray.rpc.ObjectManagerService/Pull",
    6384: "ray.rpc.ReporterService/GetTraceback",
    10001: "ray.rpc.RayletDriver/KVGet",
}
WORKER = "ray.rpc.CoreWorkerService/GetCoreWorkerStats"
PAGES = {
    6382: "/metrics",
    6383: "/get_or_create_runtime_env",
    6385: "/api/job_agent/jobs/",
    6386: "/metrics",
    6387: "/metrics",
    8265: "/api/jobs/",
}


def listening() -> set[tuple[int, str]]:
    """Port and address of every TCP socket that listens, as the kernel writes them."""
    found = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            for line in list(file)[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A":
                    address, port = local.split(":")
                    found.add((int(port, 16), kind(address)))
    return found


def kind(address: str) -> str:
    """all, loopback, or node, of an address in hexadecimal, IPv4's or that within IPv6."""
    last = address[-8:]
    if not int(address, 16):
        return "all"
    return "loopback" if last == "0100007F" or address.endswith("01000000") else "node"


def call(host: str, port: int, method: str) -> str:
    try:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            channel.unary_unary(f"/{method}")(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "answered"


def ask(host: str, port: int, page: str) -> int:
    posts = page.startswith(("/get_or", "/api/job_agent"))
    request = urllib.request.Request(f"http://{host}:{port}{page}", data=b"" if posts else None)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def main(host: str, command: str) -> None:
    subprocess.run(["bash", "-c", command], check=True, stdout=sys.stderr)
    ray.init(address=f"{host}:6379", log_to_driver=False, logging_level="ERROR")
    ray.get(ray.remote(lambda: 1).remote())
    wanted = {*CALLS, *PAGES}
    deadline = time.monotonic() + 60
    while not wanted <= {port for port, _ in listening()} and time.monotonic() < deadline:
        time.sleep(0.5)
    found = sorted(listening())
    workers = [port for port, _ in found if port > max(CALLS)]
    calls = {port: call(host, port, method) for port, method in {**CALLS, **dict.fromkeys(workers, WORKER)}.items()}
    pages = {port: ask("127.0.0.1" if port == 8265 else host, port, page) for port, page in PAGES.items()}
    print(json.dumps({"listening": found, "workers": workers, "answers": {**calls, **pages}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
