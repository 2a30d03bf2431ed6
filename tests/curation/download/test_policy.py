"""Addresses that no list of URLs may reach, whatever Python's `ipaddress` says of them."""

import ipaddress

import pytest

from vtp.curation.download.policy import Policy

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 169.255.0.0
172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255
2606:4700::1111 2001:4860:4860::8888 2a00:1450:4001:81b::200e 2001:200::1 3ffe::1
::ffff:8.8.8.8 64:ff9b::8.8.8.8
"""
REFUSED = """
0.0.0.0 0.1.2.3 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.255.255.255
169.254.0.0 169.254.169.254 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10 192.0.0.170
192.0.0.255 192.0.2.0 192.0.2.255 192.88.99.0 192.88.99.2 192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255
198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255 224.0.0.0 239.255.255.255 240.0.0.0 255.255.255.254 255.255.255.255
:: ::1 ::7f00:1 ::8.8.8.8 ::10.0.0.1 ::ffff:0.0.0.0 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:192.0.0.1 ::ffff:169.254.169.254
::ffff:0:10.0.0.1
64:ff9b::7f00:1 64:ff9b::10.0.0.1 64:ff9b::192.168.1.1 64:ff9b::192.0.0.1 64:ff9b::169.254.169.254 64:ff9b::100.64.0.1
64:ff9b:1::1 64:ff9b:1::8.8.8.8 64:ff9b:1::10.0.0.1 64:ff9b:1:ffff::1 64:ff9b:2::8.8.8.8
100::1 100:0:0:1::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:0:7f00:1:: 2001:0:808:808:0:0:f5ff:fffe 2001:1::1
2001:2::1 2001:3::1 2001:4:112::1 2001:10::1 2001:20::1 2001:30::1 2001:1ff:ffff::1 2001:db8::1 2001:db8:ffff:ffff::
2002:0a00:0001:: 2002:7f00:1::1 2002:c0a8:101::1 2002:808:808::1 3fff::1 3fff:fff:ffff::1 5f00::1 4000::1
fc00::1 fd00:ec2::254 fdff:ffff::1 fe80::1 fe80::1%eth0 febf::1 fec0::1 feff::1 ff00::1 ff02::1 ff0e::1
"""
POLICY = {"timeout": 1.0, "deadline": 1.0, "max_bytes": 1, "allowed_ports": None}
STRICT = Policy.parse(POLICY | {"allowed_networks": []}, where="test")


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses_are_reached(address):
    assert STRICT.allows_address(address)


@pytest.mark.parametrize("address", REFUSED.split())
def test_all_others_are_not(address, monkeypatch):
    assert not STRICT.allows_address(address)
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):  # another release has another list
        monkeypatch.setattr(kind, "is_global", True)
    assert not STRICT.allows_address(address)


def test_a_network_of_the_list_is_reached_in_every_form():
    policy = Policy.parse(POLICY | {"allowed_networks": ["10.1.0.0/16", "fd00::/8"]}, where="test")
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd00::1"):
        assert policy.allows_address(address)
    for address in ("10.2.0.1", "::ffff:10.2.0.1", "fc00::1"):
        assert not policy.allows_address(address)
