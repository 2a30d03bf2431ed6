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
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What IANA's registries of special addresses do not call globally reachable, and multicast: `is_global` is another list in
# every release of Python. The few reachable addresses within 192.0.0.0/24 and 2001::/23 serve protocols, no pictures.
SPECIAL_IPV4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by providers
    "127.0.0.0/8",  # loopback
    "169.254.0.0/16",  # link-local: metadata of clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # relays of 6to4, retired
    "192.168.0.0/16",  # private
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
# All that is assigned to the public lies in 2000::/3; ULA, link-local, site-local, multicast, 100::/64, 5f00::/16, local
# translators' 64:ff9b:1::/48 and ::/96 with an IPv4 address in its end do not.
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
SPECIAL_IPV6 = (
    "2001::/23",  # protocol assignments, Teredo among them
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "3fff::/20",  # documentation
)
SPECIAL = tuple(map(ipaddress.ip_network, SPECIAL_IPV4 + SPECIAL_IPV6))


class Policy(Config):
    """What a download may ask of the network."""

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
        return not any(address in network for network in SPECIAL)

    def allows_port(self, port: int) -> bool:
        return self.allowed_ports is None or port in self.allowed_ports


def innermost(text: str) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for, mapped or behind the public translators, or the address itself.

    Those of tunnels (6to4, Teredo) carry some too; they are not public, whatever they carry.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address
