"""Says which TCP ports of a host take a connection, all 65,535 tried: `python scan.py ADDRESS`. Uses nothing but Python."""

import json
import socket
import sys

PORTS = range(1, 65_536)
SECONDS = 1.0  # for an answer


def takes(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(SECONDS)
        return probe.connect_ex((address, port)) == 0


if __name__ == "__main__":
    print(json.dumps([port for port in PORTS if takes(sys.argv[1], port)]))
