//! Promises about what ports let through, checked with frames that a guest really sends.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::{IpAddr, Ipv4Addr};

use model::{
    Mac, PortId, PortPolicy,
    policy::{Allowed, Filter, Flow, Protocol, TCP, link_local},
};
use network::{Drops, Identity, Network, tap_name};
use support::{Guest, bridge, in_namespace, ip_output};

const EVERYONE: [u8; 6] = [0xff; 6];
const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
const IPV6: [u8; 2] = [0x86, 0xdd];
const SYN: u8 = 2;
const ACK: u8 = 16;
const FIN: u8 = 1;

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number)
}

fn identity(guest: &Guest, number: u8) -> Identity {
    Identity {
        mac: Mac(guest.mac),
        addresses: vec![address(number).into()],
    }
}

/// A guest with its rules, open.
fn guest(network: &Network, number: u8, policy: &PortPolicy) -> Guest {
    let guest = Guest::blocked(network, "br0", number);
    network
        .set_policy(guest.port.id, &identity(&guest, number), policy)
        .unwrap();
    network.open_port(&guest.port, &guest.announcement()).unwrap();
    guest
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind, payload].concat()
}

fn arp(from: [u8; 6], sender: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    let payload = [&head[..], &sender, &ip.octets(), &[0; 6], &address(9).octets()].concat();
    ethernet(EVERYONE, from, ARP, &payload)
}

/// An IPv4 packet; what is in it begins with two ports.
fn ipv4(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum: u32 = header
        .chunks(2)
        .map(|b| u32::from(u16::from_be_bytes([b[0], b[1]])))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [header, payload.to_vec()].concat()
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat()
}

fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let rest = [0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0];
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &rest].concat()
}

fn ipv6(next: u8, from: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    [
        &[0x60, 0, 0, 0, length[0], length[1], next, 255][..],
        &from,
        &all_nodes,
        payload,
    ]
    .concat()
}

/// Sends a frame and tells how many frames the other got of it.
fn arrives(from: &Guest, to: &Guest, frame: &[u8]) -> bool {
    to.frames();
    from.send_frame(frame);
    // Bridges forward in the sender's system call.
    !to.frames().is_empty()
}

fn drops(network: &Network, guest: &Guest) -> Drops {
    network.drops().unwrap()[&guest.port.tap]
}

// tidy: long because it is the list of all that a guest may and may not send.
#[test]
fn a_guest_sends_only_under_its_own_addresses_and_nothing_that_only_routers_do() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let a = guest(&network, 1, &PortPolicy::default());
        let b = Guest::open(&network, "br0", 2);
        let (own, other) = (a.mac, [2, 0, 0, 0, 0, 99]);
        let v4 = |packet: Vec<u8>| ethernet(b.mac, own, IPV4, &packet);
        let v6 = |packet: Vec<u8>| ethernet(EVERYONE, own, IPV6, &packet);
        let local = link_local(Mac(own)).octets();
        let advertised = |target: [u8; 16]| [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target, &[2, 1], &own].concat();
        let good = [
            ("ARP", arp(own, own, address(1))),
            ("an ARP probe", arp(own, own, Ipv4Addr::UNSPECIFIED)),
            ("RARP", ethernet(EVERYONE, own, [0x80, 0x35], &[0; 28])),
            ("UDP", v4(ipv4(17, address(1), address(2), &udp(1, 2)))),
            (
                "a DHCP client",
                v4(ipv4(17, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, &udp(68, 67))),
            ),
            ("IPv6", v6(ipv6(17, local, &udp(1, 2)))),
            (
                "duplicate detection",
                v6(ipv6(58, [0; 16], &[135, 0, 0, 0, 0, 0, 0, 0])),
            ),
            ("an advertisement of itself", v6(ipv6(58, local, &advertised(local)))),
        ];
        for (what, frame) in &good {
            assert!(arrives(&a, &b, frame), "{what}");
        }
        let stranger = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
        let tagged = [&[0, 5][..], &IPV4, &ipv4(17, address(7), address(2), &udp(1, 2))].concat();
        let bad = [
            (
                "another MAC",
                ethernet(b.mac, other, IPV4, &ipv4(17, address(1), address(2), &udp(1, 2))),
            ),
            ("ARP from another MAC", arp(other, own, address(1))),
            ("ARP of another MAC", arp(own, other, address(1))),
            ("ARP of another address", arp(own, own, address(7))),
            ("another IPv4 address", v4(ipv4(17, address(7), address(2), &udp(1, 2)))),
            (
                "no address, yet no DHCP",
                v4(ipv4(17, Ipv4Addr::UNSPECIFIED, address(2), &udp(68, 53))),
            ),
            (
                "no address, no UDP",
                v4(ipv4(6, Ipv4Addr::UNSPECIFIED, address(2), &tcp(68, 67, SYN))),
            ),
            ("a DHCP server", v4(ipv4(17, address(1), address(2), &udp(67, 68)))),
            (
                "an ICMP redirect",
                v4(ipv4(1, address(1), address(2), &[5, 1, 0, 0, 0, 0, 0, 0])),
            ),
            ("another IPv6 address", v6(ipv6(17, stranger, &udp(1, 2)))),
            ("no IPv6 address, no ICMPv6", v6(ipv6(17, [0; 16], &udp(1, 2)))),
            (
                "an RA",
                v6(ipv6(58, local, &[134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            ),
            ("a DHCPv6 server", v6(ipv6(17, local, &udp(547, 546)))),
            (
                "an advertisement of another",
                v6(ipv6(58, local, &advertised(stranger))),
            ),
            ("a VLAN tag", ethernet(b.mac, own, [0x81, 0], &tagged)),
            ("another protocol", ethernet(b.mac, own, [0x88, 0xb5], &[0; 40])),
        ];
        for (what, frame) in &bad {
            assert!(!arrives(&a, &b, frame), "{what}");
        }
        assert_eq!(drops(&network, &a).spoofed, bad.len() as u64);
        let learnt = ip_output(&format!("-s link show dev {}", a.port.tap));
        assert!(!learnt.is_empty());
        let entries = String::from_utf8(
            std::process::Command::new("bridge")
                .args(["fdb", "show"])
                .output()
                .unwrap()
                .stdout,
        );
        assert!(
            !entries.unwrap().contains("00:00:00:00:63"),
            "the bridge learnt a spoofed MAC"
        );
        // The other end is not judged by a's rules.
        assert!(arrives(
            &b,
            &a,
            &ethernet(own, b.mac, IPV4, &ipv4(17, address(2), address(1), &udp(1, 2)))
        ));

        let allowed = PortPolicy {
            allowed: vec!["10.0.0.0/28".parse().unwrap(), "2001:db8::/64".parse().unwrap()],
            ..PortPolicy::default()
        };
        network.set_policy(a.port.id, &identity(&a, 1), &allowed).unwrap();
        for at in [3, 4, 9] {
            assert!(arrives(&a, &b, &bad[at].1), "{} is allowed now", bad[at].0);
        }
        assert!(!arrives(&a, &b, &bad[0].1), "its MAC is still its own");
        network.remove_policy(a.port.id).unwrap();
        network.remove_policy(a.port.id).unwrap();
        assert_eq!(network.policies().unwrap(), Vec::<String>::new());
        assert_eq!(network.drops().unwrap().len(), 0, "nothing of it is left");
    });
}

fn rule(protocol: Protocol, ports: Option<&str>, remote: Option<&str>) -> Allowed {
    Allowed {
        protocol,
        ports: ports.map(|ports| ports.parse().unwrap()),
        remote: remote.map(|remote| remote.split_whitespace().map(|range| range.parse().unwrap()).collect()),
    }
}

fn filter(ingress: Vec<Allowed>, egress: Vec<Allowed>) -> PortPolicy {
    PortPolicy {
        filter: Some(Filter { ingress, egress }),
        ..PortPolicy::default()
    }
}

#[test]
fn what_a_group_allows_goes_on_in_both_directions_and_nothing_else_passes() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let web = filter(
            vec![rule(Protocol::Tcp, Some("80-90"), Some("10.0.0.2 10.0.0.0/30"))],
            vec![
                rule(Protocol::Udp, Some("53"), None),
                rule(Protocol::Icmp, None, Some("10.0.0.2")),
            ],
        );
        let a = guest(&network, 1, &web);
        let b = Guest::open(&network, "br0", 2);
        let to =
            |protocol, payload: &[u8]| ethernet(a.mac, b.mac, IPV4, &ipv4(protocol, address(2), address(1), payload));
        let from =
            |protocol, payload: &[u8]| ethernet(b.mac, a.mac, IPV4, &ipv4(protocol, address(1), address(2), payload));

        assert!(!arrives(&b, &a, &to(6, &tcp(5000, 22, SYN))), "another port");
        let far = ethernet(
            a.mac,
            b.mac,
            IPV4,
            &ipv4(6, Ipv4Addr::new(10, 1, 0, 1), address(1), &tcp(5000, 80, SYN)),
        );
        assert!(!arrives(&b, &a, &far), "from elsewhere");
        assert!(!arrives(&a, &b, &from(6, &tcp(80, 5000, ACK))), "an answer to nothing");
        assert!(arrives(&b, &a, &to(6, &tcp(5000, 80, SYN))));
        assert!(arrives(&a, &b, &from(6, &tcp(80, 5000, SYN | ACK))), "the answer");
        assert!(!arrives(&a, &b, &from(6, &tcp(80, 5001, ACK))), "not to another port");
        assert!(arrives(&a, &b, &from(6, &tcp(80, 5000, FIN | ACK))), "its end");
        assert!(arrives(&b, &a, &to(6, &tcp(5000, 80, FIN | ACK))), "both ends");
        assert!(arrives(&a, &b, &from(6, &tcp(80, 5000, ACK))), "the last word");
        let flows = network.flows(a.port.id).unwrap();
        assert!(
            flows.iter().all(|flow| flow.ending && flow.guest_port == 80),
            "{flows:?}"
        );

        assert!(!arrives(&b, &a, &to(17, &udp(53, 4000))), "an answer to nothing");
        assert!(arrives(&a, &b, &from(17, &udp(4000, 53))));
        assert!(arrives(&b, &a, &to(17, &udp(53, 4000))));
        assert!(
            !arrives(&b, &a, &to(1, &[8, 0, 0, 0, 0, 1, 0, 1])),
            "it may ping, not be pinged"
        );
        assert!(arrives(&a, &b, &from(1, &[8, 0, 0, 0, 0, 1, 0, 1])));
        assert!(arrives(&b, &a, &to(1, &[0, 0, 0, 0, 0, 1, 0, 1])));
        assert!(arrives(&b, &a, &to(1, &[3, 4, 0, 0, 0, 0, 0, 0])), "path MTU");
        assert!(arrives(&b, &a, &arp(b.mac, b.mac, address(2))));
        assert!(arrives(&b, &a, &to(17, &udp(67, 68))), "its address comes by DHCP");
        let counted = drops(&network, &a);
        assert_eq!((counted.to_guest, counted.from_guest), (4, 2), "{counted:?}");

        // Nobody is in a group: nobody may.
        let nobody = filter(vec![rule(Protocol::Any, None, Some(""))], vec![]);
        network.set_policy(a.port.id, &identity(&a, 1), &nobody).unwrap();
        assert!(!arrives(&b, &a, &to(6, &tcp(5000, 80, SYN))));
        network
            .set_policy(
                a.port.id,
                &identity(&a, 1),
                &filter(vec![rule(Protocol::Any, None, None)], vec![]),
            )
            .unwrap();
        assert!(arrives(&b, &a, &to(6, &tcp(5000, 22, SYN))));
        assert!(arrives(&a, &b, &from(6, &tcp(22, 5000, SYN | ACK))));
    });
}

#[test]
fn a_change_ends_at_once_what_is_no_longer_allowed_and_nothing_else() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let both = filter(
            vec![
                rule(Protocol::Tcp, Some("22"), None),
                rule(Protocol::Tcp, Some("80"), None),
            ],
            vec![],
        );
        let a = guest(&network, 1, &both);
        let b = Guest::open(&network, "br0", 2);
        let to = |port, flags| {
            ethernet(
                a.mac,
                b.mac,
                IPV4,
                &ipv4(6, address(2), address(1), &tcp(5000, port, flags)),
            )
        };
        let from = |port| {
            ethernet(
                b.mac,
                a.mac,
                IPV4,
                &ipv4(6, address(1), address(2), &tcp(port, 5000, ACK)),
            )
        };
        for port in [22, 80] {
            assert!(arrives(&b, &a, &to(port, SYN)) && arrives(&a, &b, &from(port)));
        }
        let one = filter(vec![rule(Protocol::Tcp, Some("80"), None)], vec![]);
        network.set_policy(a.port.id, &identity(&a, 1), &one).unwrap();
        assert!(arrives(&a, &b, &from(80)), "what lives and is allowed goes on");
        assert!(
            !arrives(&a, &b, &from(22)) && !arrives(&b, &a, &to(22, ACK)),
            "the other has ended"
        );

        let down = PortPolicy { link_down: true, ..one };
        network.set_policy(a.port.id, &identity(&a, 1), &down).unwrap();
        assert!(!arrives(&a, &b, &from(80)) && !arrives(&b, &a, &to(80, ACK)));
        assert!(
            !arrives(&a, &b, &arp(a.mac, a.mac, address(1))),
            "nothing at all passes"
        );
        network
            .set_policy(
                a.port.id,
                &identity(&a, 1),
                &PortPolicy {
                    link_down: false,
                    ..down
                },
            )
            .unwrap();
        assert!(arrives(&a, &b, &from(80)), "what lived before is still known");
    });
}

#[test]
fn what_was_under_way_elsewhere_goes_on_here_when_it_is_told() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let closed = filter(vec![], vec![rule(Protocol::Tcp, None, None)]);
        let a = guest(&network, 1, &closed);
        let b = Guest::open(&network, "br0", 2);
        let data = ethernet(
            a.mac,
            b.mac,
            IPV4,
            &ipv4(6, address(2), address(1), &tcp(80, 5000, ACK)),
        );
        assert!(!arrives(&b, &a, &data), "nobody knows of it");
        let many = (0..2000).map(|port| Flow {
            remote: IpAddr::V4(address(2)),
            protocol: TCP,
            guest_port: 4000 + port,
            remote_port: 80,
            ending: false,
            expires_s: 7000,
        });
        let local: Flow = Flow {
            remote: "fe80::1".parse().unwrap(),
            ..many.clone().next().unwrap()
        };
        let pinged = Flow {
            protocol: 1,
            guest_port: 0,
            remote_port: 0,
            ..many.clone().next().unwrap()
        };
        let told: Vec<Flow> = many.chain([local, pinged]).collect();
        network.add_flows(a.port.id, &told).unwrap();
        assert!(arrives(&b, &a, &data), "it goes on");
        let mut read = network.flows(a.port.id).unwrap();
        assert_eq!(read.len(), told.len());
        for flow in &mut read {
            assert!((6900..=7500).contains(&flow.expires_s), "{flow:?}");
            flow.expires_s = 7000;
        }
        assert!(
            told.iter().all(|flow| read.contains(flow)),
            "what is read is what was told"
        );
        assert_eq!(
            network.flows(PortId(uuid::Uuid::from_u128(9))).unwrap(),
            [],
            "a port that is not there"
        );
        assert_eq!(network.policies().unwrap(), [tap_name(a.port.id)]);
    });
}
