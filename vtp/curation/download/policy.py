"""Which addresses a download may reach, and how much time and space one picture may take.

A list of URLs is written by strangers. Without a policy a download reads `file:` URLs, follows redirects into the
private network that it runs in, and waits for ever for a server that sends one byte a minute.
"""

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Self

from pydantic import Field, model_validator

from vtp.config import Config

SCHEMES = ("http", "https")
PREFIX = "proxy: "  # of the proxy's reason phrases that tell a cause
DEADLINE_HEADER = "vtp-deadline"  # Unix time; redirects of one attempt carry the same
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The rest of IPv6 is no public address, though `is_global` is true of its retired and unassigned parts: site-local
# fec0::/10, 64:ff9b:1::/48 of local translators, and ::/96 with an IPv4 address in its end.
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")


class Policy(Config):
    """What the proxy between img2dataset and the network lets through."""

    timeout: float = Field(gt=0, description="time in seconds that one operation on a socket may take")
    deadline: float = Field(
        gt=0, description="time in seconds that an attempt may take, redirects and slow drips included"
    )
    max_bytes: int = Field(ge=1, description="bytes of the largest body")
    allowed_networks: list[str] = Field(description="CIDR blocks that are allowed beside the public internet")
    allowed_ports: list[Annotated[int, Field(ge=1, le=65535)]] | None = Field(
        description="ports that may be asked; null: any"
    )

    @model_validator(mode="after")
    def _networks_are_networks(self) -> Self:
        for network in self.allowed_networks:
            ipaddress.ip_network(network)
        return self

    def allows_address(self, text: str) -> bool:
        """Whether an IP address is public or in an allowed network, whatever it is wrapped in."""
        address = innermost(text)
        if any(address in ipaddress.ip_network(network) for network in self.allowed_networks):
            return True
        if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
            return False
        return address.is_global and not address.is_multicast

    def allows_port(self, port: int) -> bool:
        return self.allowed_ports is None or port in self.allowed_ports


def innermost(text: str) -> IPv4Address | IPv6Address:
    """The IPv4 address within an IPv6 address that carries one, or the address itself."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, IPv4Address):
        return address
    carried = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
    if address in NAT64:
        carried = IPv4Address(int(address) & 0xFFFFFFFF)
    return carried or address
