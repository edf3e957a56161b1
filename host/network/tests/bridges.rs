//! Promises about bridges, checked against what `ip` reports.
#![allow(clippy::unwrap_used)]

mod support;

use std::{fs, net::Ipv4Addr};

use network::{BridgeError, BridgeSpec, Gateway};
use support::{Guest, bridge, in_namespace, ip, ip_output, name, spec};

fn with_uplink(bridge: &str, uplink: &str) -> BridgeSpec {
    BridgeSpec {
        uplink: Some(name(uplink)),
        ..spec(bridge)
    }
}

fn with_gateway(ip: &str, prefix: u8) -> BridgeSpec {
    BridgeSpec {
        gateway: Some(Gateway {
            ip: ip.parse().unwrap(),
            prefix,
        }),
        ..spec("br0")
    }
}

#[test]
fn a_bridge_is_made_once_as_asked_and_made_again_without_a_change() {
    in_namespace(|network| {
        ip("link add up0 mtu 9000 type veth peer name far0");
        let wanted = BridgeSpec {
            mtu: 1400,
            gateway: Some(Gateway {
                ip: Ipv4Addr::new(10, 1, 0, 1).into(),
                prefix: 16,
            }),
            ..with_uplink("br0", "up0")
        };
        let made = network.ensure_bridge(&wanted).unwrap();
        assert!(made.ours);
        let described = ip_output("-d link show br0");
        for part in [
            "mtu 1400",
            "stp_state 0",
            "forward_delay 0",
            "mcast_snooping 0",
            "<BROADCAST,MULTICAST,UP",
        ] {
            assert!(described.contains(part), "{part}: {described}");
        }
        assert!(ip_output("link show up0").contains("master br0"));
        assert!(ip_output("address show br0").contains("inet 10.1.0.1/16"));
        let addresses = ip_output("address show");
        assert_eq!(network.ensure_bridge(&wanted).unwrap(), made);
        assert_eq!(ip_output("address show"), addresses);
    });
}

#[test]
fn a_changed_gateway_or_frame_size_replaces_the_earlier_one() {
    in_namespace(|network| {
        network.ensure_bridge(&with_gateway("10.1.0.1", 16)).unwrap();
        network
            .ensure_bridge(&BridgeSpec {
                mtu: 1300,
                ..with_gateway("fd00::1", 64)
            })
            .unwrap();
        let shown = ip_output("address show br0");
        assert!(
            shown.contains("fd00::1/64") && shown.contains("mtu 1300") && !shown.contains("10.1.0.1"),
            "{shown}"
        );
        network.ensure_bridge(&spec("br0")).unwrap();
        assert!(!ip_output("address show br0").contains("inet"));
    });
}

#[test]
fn the_hosts_side_is_silent_and_deaf_to_router_advertisements() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        assert!(
            !ip_output("address show").contains("inet6"),
            "no link-local address anywhere"
        );
        let setting = |key: &str| {
            fs::read_to_string(format!("/proc/sys/net/{key}"))
                .unwrap()
                .trim()
                .to_owned()
        };
        assert_eq!(setting("ipv6/conf/br0/accept_ra"), "0");
        assert_eq!(setting("ipv6/conf/br0/disable_ipv6"), "1");
        assert_eq!(setting("ipv4/conf/br0/arp_ignore"), "1");
        assert!(guest.queued().is_empty());
    });
}

#[test]
fn the_bridges_mac_does_not_change_when_guests_come_and_go() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let mac = || {
            ip_output("-o link show br0")
                .split_whitespace()
                .skip_while(|w| *w != "link/ether")
                .nth(1)
                .unwrap()
                .to_owned()
        };
        let before = mac();
        // Of sixteen random MACs one is almost surely lower than the bridge's.
        let guests: Vec<_> = (0..16).map(|n| Guest::open(&network, "br0", n)).collect();
        assert_eq!(mac(), before);
        drop(guests);
        assert_eq!(mac(), before);
    });
}

#[test]
fn a_refused_bridge_leaves_nothing() {
    in_namespace(|network| {
        ip("link add up0 type veth peer name far0");
        ip("address add 192.0.2.1/24 dev up0");
        ip("link add other type bridge");
        ip("link add taken type veth peer name far1");
        ip("link set taken master other");
        let refusals = [
            network.ensure_bridge(&with_uplink("br0", "absent")).unwrap_err(),
            network.ensure_bridge(&with_uplink("br0", "up0")).unwrap_err(),
            network.ensure_bridge(&with_uplink("br0", "taken")).unwrap_err(),
            network.ensure_bridge(&with_uplink("br0", "other")).unwrap_err(),
            network.ensure_bridge(&with_uplink("br0", "lo")).unwrap_err(),
            network
                .ensure_bridge(&BridgeSpec {
                    mtu: 9000,
                    ..with_uplink("br0", "far0")
                })
                .unwrap_err(),
            network
                .ensure_bridge(&BridgeSpec { mtu: 0, ..spec("br0") })
                .unwrap_err(),
            network.ensure_bridge(&with_gateway("10.0.0.1", 33)).unwrap_err(),
            // Only the kernel knows that this cannot be an interface's address, after the bridge was made.
            network.ensure_bridge(&with_gateway("ff02::1", 64)).unwrap_err(),
        ];
        for refusal in refusals {
            let text = refusal.to_string();
            assert!(text.contains("br0") && text.len() < 250, "{text}");
        }
        assert!(!ip_output("link").contains("br0"));
        assert!(ip_output("address show up0").contains("192.0.2.1"));
    });
}

#[test]
fn an_interface_of_another_kind_is_not_taken_for_a_bridge() {
    in_namespace(|network| {
        ip("link add br0 type veth peer name far0");
        let error = network.ensure_bridge(&spec("br0")).unwrap_err();
        assert!(
            matches!(&error, BridgeError::NameTaken { kind, .. } if kind == "veth"),
            "{error}"
        );
        network.remove_bridge(&name("br0")).unwrap();
        assert!(ip_output("link").contains("br0"));
    });
}

#[test]
fn a_bridge_of_others_is_used_when_fit_and_never_changed() {
    in_namespace(|network| {
        ip("link add br0 type bridge stp_state 1");
        let refused = |what: &str, spec: &BridgeSpec| {
            let error = network.ensure_bridge(spec).unwrap_err();
            assert!(
                matches!(&error, BridgeError::Foreign { .. }) && error.to_string().contains(what),
                "{error}"
            );
        };
        refused("spanning tree", &spec("br0"));
        ip("link set br0 type bridge stp_state 0");
        refused("down", &spec("br0"));
        ip("link set br0 up");
        refused(
            "MTU",
            &BridgeSpec {
                mtu: 1501,
                ..spec("br0")
            },
        );
        refused("10.0.0.1", &with_gateway("10.0.0.1", 8));
        ip("link add up0 type veth peer name far0");
        refused("up0", &with_uplink("br0", "up0"));
        ip("address add 10.0.0.1/8 dev br0");
        ip("link set up0 master br0");
        let fit = BridgeSpec {
            uplink: Some(name("up0")),
            ..with_gateway("10.0.0.1", 8)
        };
        assert!(!network.ensure_bridge(&fit).unwrap().ours);
        let (a, b) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        a.send(b.mac, "hello");
        assert_eq!(b.receive(), "hello");
        network.remove_bridge(&name("br0")).unwrap();
        assert!(ip_output("link").contains("br0"));
    });
}

#[test]
fn a_bridge_goes_only_without_guests_and_frees_its_uplink() {
    in_namespace(|network| {
        ip("link add up0 type veth peer name far0");
        network.ensure_bridge(&with_uplink("br0", "up0")).unwrap();
        let guest = Guest::open(&network, "br0", 1);
        assert!(matches!(
            network.remove_bridge(&name("br0")),
            Err(BridgeError::Busy { ports: 1, .. })
        ));
        drop(guest);
        network.remove_bridge(&name("br0")).unwrap();
        network.remove_bridge(&name("br0")).unwrap();
        assert!(!ip_output("link").contains("br0"));
    });
}

#[test]
fn a_gateway_answers_guests() {
    in_namespace(|network| {
        network.ensure_bridge(&with_gateway("10.0.0.1", 24)).unwrap();
        let guest = Guest::open(&network, "br0", 1);
        let sender = Ipv4Addr::new(10, 0, 0, 7).octets();
        let mut request = vec![0; 10];
        request.extend_from_slice(&[0xff; 6]);
        request.extend_from_slice(&guest.mac);
        request.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend_from_slice(&guest.mac);
        request.extend_from_slice(&sender);
        request.extend_from_slice(&[0; 6]);
        request.extend_from_slice(&[10, 0, 0, 1]);
        request.resize(70, 0);
        rustix::io::write(&guest.fd, &request).unwrap();
        let answer = guest.next_frame(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
        assert_eq!(answer.expect("an ARP answer")[28..32], [10, 0, 0, 1]);
    });
}
