//! Promises about ports, checked with frames that really pass or do not.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    net::Ipv4Addr,
    os::fd::AsFd,
    process::{Command, Stdio},
};

use model::{Mac, PortId};
use network::{Announcement, BridgeSpec, PortError, TapError, tap_name};
use support::{Guest, bridge, in_namespace, ip, ip_output, mac, name, spec};
use uuid::Uuid;

const EVERYONE: [u8; 6] = [0xff; 6];

#[test]
fn a_blocked_port_passes_no_frame_in_either_direction_and_an_open_one_passes_them_at_once() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let [a, b] = [1, 2].map(|n| Guest::open(&network, "br0", n));
        let blocked = Guest::blocked(&network, "br0", 3);

        a.send(EVERYONE, "to all, while blocked");
        a.send(blocked.mac, "to the blocked one");
        blocked.send(EVERYONE, "from the blocked one");
        // Bridges forward in the sender's system call and in order: when this has arrived nothing older is under way.
        a.send(b.mac, "mark");
        assert_eq!(b.receive(), "to all, while blocked");
        assert_eq!(b.receive(), "to the blocked one", "flooded, its place being unknown");
        assert_eq!(b.receive(), "mark");
        assert_eq!(blocked.queued(), Vec::<String>::new());
        assert_eq!(a.queued(), Vec::<String>::new());

        network.open_port(&blocked.port, &blocked.announcement()).unwrap();
        a.send(blocked.mac, "first");
        assert_eq!(blocked.queued(), ["first"], "there without any wait");
        assert_eq!(
            b.queued(),
            Vec::<String>::new(),
            "the bridge knew the place without having heard the guest"
        );
        blocked.send(a.mac, "answer");
        assert_eq!(a.queued(), ["answer"]);

        network.block_port(&blocked.port).unwrap();
        a.send(blocked.mac, "late");
        blocked.send(a.mac, "late");
        a.send(b.mac, "mark");
        assert_eq!(b.receive(), "mark");
        assert_eq!((blocked.queued(), a.queued()), (vec![], vec![]));
    });
}

#[test]
fn a_block_outlives_carrier_notices_and_a_new_ensure() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let (a, b) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        let blocked = Guest::blocked(&network, "br0", 3);
        // Each of these makes the kernel notify the bridge of a change of this port.
        let tap = &blocked.port.tap;
        ip(&format!("link set {tap} promisc on"));
        ip(&format!("link set {tap} mtu 1400"));
        ip(&format!("link set {tap} allmulticast on"));
        bridge(&network, "br0");
        a.send(EVERYONE, "to all");
        assert_eq!(b.receive(), "to all");
        assert_eq!(blocked.queued(), Vec::<String>::new());
        assert!(!network.find_port(blocked.port.id).unwrap().unwrap().open);
    });
}

#[test]
fn nothing_queued_before_the_block_reaches_the_guest() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let network = std::sync::Arc::new(network);
        let noisy = Guest::open(&network, "br0", 1);
        for round in 0..50u8 {
            // Frames fly while the tap passes through the states on its way to blocked.
            let guest = std::thread::scope(|scope| {
                let made = scope.spawn(|| {
                    // A thread inherits its maker's namespace.
                    Guest::blocked(&network, "br0", 2)
                });
                while !made.is_finished() {
                    noisy.send(EVERYONE, "noise");
                }
                made.join().unwrap()
            });
            assert_eq!(guest.queued(), Vec::<String>::new(), "round {round}");
        }
    });
}

/// Two hosts of ours and a third station, joined by a switch that knows nothing of Godwit.
fn two_hosts(network: &network::Network) -> Guest {
    for host in ["a", "b"] {
        ip(&format!("link add up-{host} type veth peer name sw-{host}"));
        ip(&format!("link set sw-{host} up"));
    }
    bridge(network, "switch");
    for host in ["a", "b"] {
        ip(&format!("link set sw-{host} master switch"));
        let uplink = Some(name(&format!("up-{host}")));
        network
            .ensure_bridge(&BridgeSpec {
                uplink,
                ..spec(&format!("host-{host}"))
            })
            .unwrap();
    }
    for host in ["a", "b"] {
        support::wait_until_forwarding(&format!("up-{host}"));
        support::wait_until_forwarding(&format!("sw-{host}"));
    }
    Guest::open(network, "switch", 9)
}

#[test]
fn opening_on_another_host_moves_the_forwarding_entries_of_all_switches() {
    in_namespace(|network| {
        let station = two_hosts(&network);
        let before = Guest::open(&network, "host-a", 1);
        before.send(EVERYONE, "I am behind a");
        assert_eq!(station.receive(), "I am behind a");
        station.send(before.mac, "on a");
        assert_eq!(before.receive(), "on a");

        // The same guest, on the other host: host-b's bridge believes it is behind the uplink, the switch behind a.
        let tap = network.create_tap(PortId(Uuid::from_u128(1)), &name("host-b")).unwrap();
        let after = Guest {
            port: tap.port,
            mac: before.mac,
            fd: tap.fd,
        };
        network.block_port(&before.port).unwrap();
        station.send(before.mac, "in the blackout");

        let address = Ipv4Addr::new(10, 9, 8, 7);
        network
            .open_port(&after.port, &Announcement::new(Mac(after.mac), &[address.into()]))
            .unwrap();
        let rarp = station.next_frame(|frame| frame[12..14] == [0x80, 0x35] && frame[6..12] == after.mac);
        assert!(rarp.is_some());
        let arp = station.next_frame(|frame| frame[12..14] == [0x08, 0x06] && frame[28..32] == address.octets());
        assert!(arp.is_some());
        station.send(after.mac, "on b");
        assert_eq!(after.receive(), "on b");
        assert_eq!(before.queued(), Vec::<String>::new());
    });
}

#[test]
fn a_port_that_is_resumed_on_the_first_host_takes_its_traffic_back() {
    in_namespace(|network| {
        let station = two_hosts(&network);
        let first = Guest::open(&network, "host-a", 1);
        let tap = network.create_tap(PortId(Uuid::from_u128(1)), &name("host-b")).unwrap();
        network.block_port(&first.port).unwrap();
        network.open_port(&tap.port, &first.announcement()).unwrap();
        network.block_port(&tap.port).unwrap();
        network.open_port(&first.port, &first.announcement()).unwrap();
        let heard = station.next_frame(|frame| frame[6..12] == first.mac);
        assert!(heard.is_some());
        // The announcements crossed two virtual cables: the station may hear the earlier one first.
        let end = std::time::Instant::now() + support::DEADLINE;
        let mut back = Vec::new();
        while back.is_empty() && std::time::Instant::now() < end {
            station.send(first.mac, "back on a");
            back = first.queued();
        }
        assert_eq!(back.first().map(String::as_str), Some("back on a"));
    });
}

#[test]
fn the_guest_does_not_hear_its_own_announcement() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let other = Guest::open(&network, "br0", 1);
        let guest = Guest::open(&network, "br0", 2);
        assert!(other.next_frame(|frame| frame[6..12] == guest.mac).is_some());
        other.send(guest.mac, "mark");
        let first = guest.next_frame(|_| true).unwrap();
        assert_eq!(first[6..12], other.mac);
    });
}

#[test]
fn a_tap_lives_as_long_as_a_process_holds_it_and_no_longer() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::blocked(&network, "br0", 1);
        let id = guest.port.id;
        // As QEMU gets it: a duplicate on the standard input of another process.
        let mut holder = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(guest.fd.as_fd().try_clone_to_owned().unwrap()))
            .spawn();
        let holder = holder.as_mut().unwrap();
        drop(guest);
        assert!(
            network.find_port(id).unwrap().is_some(),
            "the agent's copy is closed, the other lives"
        );
        let again = network.create_tap(id, &name("br0")).unwrap_err();
        assert!(matches!(again, TapError::Exists { .. }), "{again}");
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert_eq!(network.find_port(id).unwrap(), None);
        assert_eq!(network.ports().unwrap(), []);
    });
}

#[test]
fn removing_takes_the_tap_even_from_its_holder_and_twice_is_fine() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        network.remove(guest.port.id).unwrap();
        network.remove(guest.port.id).unwrap();
        let gone = network.open_port(&guest.port, &guest.announcement()).unwrap_err();
        assert!(matches!(gone, PortError::Gone { .. }), "{gone}");
        assert!(matches!(network.block_port(&guest.port), Err(PortError::Gone { .. })));
        assert!(matches!(network.counters(&guest.port), Err(PortError::Gone { .. })));
    });
}

#[test]
fn what_others_made_under_a_ports_name_is_left_alone() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let id = PortId(Uuid::from_u128(7));
        ip(&format!("link add {} type veth peer name far0", tap_name(id)));
        assert!(matches!(network.remove(id), Err(PortError::NotOurs { .. })));
        assert!(network.create_tap(id, &name("br0")).is_err());
        assert!(ip_output("link").contains(&tap_name(id)));
        assert_eq!(network.ports().unwrap(), []);
    });
}

#[test]
fn a_tap_for_a_bridge_that_is_not_there_leaves_nothing() {
    in_namespace(|network| {
        ip("link add veth0 type veth peer name far0");
        for bridge in ["absent", "veth0"] {
            let error = network
                .create_tap(PortId(Uuid::from_u128(7)), &name(bridge))
                .unwrap_err();
            assert!(matches!(error, TapError::NoBridge { .. }), "{error}");
        }
        assert!(!ip_output("link").contains("gw0"));
    });
}

#[test]
fn a_port_taken_off_its_bridge_by_others_says_so() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::blocked(&network, "br0", 1);
        ip(&format!("link set {} nomaster", guest.port.tap));
        let error = network.open_port(&guest.port, &guest.announcement()).unwrap_err();
        assert!(matches!(error, PortError::Detached { .. }), "{error:?}");
    });
}

#[test]
fn ports_are_listed_with_their_ids_and_states() {
    in_namespace(|network| {
        bridge(&network, "br0");
        ip("tuntap add stranger mode tap");
        let (open, blocked) = (Guest::open(&network, "br0", 1), Guest::blocked(&network, "br0", 2));
        let mut found: Vec<_> = network.ports().unwrap().into_iter().map(|f| (f.port, f.open)).collect();
        found.sort_by_key(|(port, _)| port.index);
        assert_eq!(found, [(open.port.clone(), true), (blocked.port.clone(), false)]);
    });
}

#[test]
fn counters_are_the_guests() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let (a, b) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        a.queued(); // b's announcement
        let before = network.counters(&a.port).unwrap();
        for _ in 0..3 {
            a.send(b.mac, "x");
        }
        b.send(mac(1), "y");
        assert_eq!(a.receive(), "y"); // what the guest has not taken is not counted
        let after = network.counters(&a.port).unwrap();
        assert_eq!(network.traffic(&[]).unwrap().ports[&a.port.id], after);
        assert_eq!(after.sent_frames - before.sent_frames, 3);
        assert_eq!(after.sent_bytes - before.sent_bytes, 180);
        assert_eq!(
            (
                after.received_frames - before.received_frames,
                after.received_bytes - before.received_bytes
            ),
            (1, 60)
        );
    });
}
