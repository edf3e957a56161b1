//! Promises about how much passes a port, checked with frames and a clock.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use model::{
    Mac, PortPolicy,
    policy::{RateLimit, link_local},
};
use network::Identity;
use support::{Guest, bridge, in_namespace, ip_output};

const RATE: u64 = 2_000_000;
const TIME: Duration = Duration::from_secs(2);
/// Frames a sender is ahead of its receiver at most: fewer than a tap's queue holds.
const AHEAD: u64 = 300;
const PAYLOAD: usize = 1400;

fn limited(to_guest: Option<u64>, from_guest: Option<u64>) -> PortPolicy {
    let limit = |bytes_per_s| RateLimit {
        bytes_per_s,
        burst_bytes: None,
    };
    PortPolicy {
        to_guest: to_guest.map(limit),
        from_guest: from_guest.map(limit),
        ..PortPolicy::default()
    }
}

/// Bytes/s that come through while more are sent than may pass.
fn measured(from: &Guest, to: &Guest) -> f64 {
    let text = "x".repeat(PAYLOAD);
    to.frames();
    let (mut sent, mut came, mut bytes) = (0u64, 0u64, 0usize);
    let begin = Instant::now();
    let mut counted_from = None;
    while begin.elapsed() < TIME {
        if sent < came + AHEAD {
            from.send(to.mac, &text);
            sent += 1;
        }
        for frame in to.frames() {
            came += 1;
            // What passes at once at the beginning is no rate.
            if begin.elapsed() > TIME / 4 {
                counted_from.get_or_insert_with(Instant::now);
                bytes += frame.len();
            }
        }
    }
    bytes as f64 / counted_from.expect("frames came").elapsed().as_secs_f64()
}

#[test]
fn what_a_guest_is_sent_and_sends_is_held_to_its_limit_and_let_go_again() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let [a, b] = [1, 2].map(|n| Guest::open(&network, "br0", n));
        let near = |rate: f64| (rate / RATE as f64 - 1.0).abs() < 0.15;
        let free = measured(&a, &b);
        assert!(free > 2.0 * RATE as f64, "the test itself is too slow: {free}");
        let id = a.port.id;

        network.set_limits(id, &limited(Some(RATE), None)).unwrap();
        let rate = measured(&b, &a);
        assert!(near(rate), "to the guest: {rate}");
        assert!(measured(&a, &b) > 2.0 * RATE as f64, "the other direction is free");

        network.set_limits(id, &limited(None, Some(RATE))).unwrap();
        network.set_limits(id, &limited(None, Some(RATE))).unwrap();
        let rate = measured(&a, &b);
        assert!(near(rate), "from the guest: {rate}");
        assert!(measured(&b, &a) > 2.0 * RATE as f64, "the other direction is free");

        network.set_limits(id, &limited(None, None)).unwrap();
        assert!(measured(&a, &b) > 2.0 * RATE as f64, "let go");
        assert!(!ip_output("link").contains(" gi"), "nothing of it is left");
    });
}

#[test]
fn what_is_held_back_is_judged_all_the_same_and_nothing_is_left_of_a_port_that_is_gone() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let [a, b] = [1, 2].map(|n| Guest::open(&network, "br0", n));
        let identity = Identity {
            mac: Mac(a.mac),
            addresses: vec![link_local(Mac(a.mac)).into()],
        };
        let policy = limited(None, Some(RATE));
        network.set_limits(a.port.id, &policy).unwrap();
        network.set_policy(a.port.id, &identity, &policy).unwrap();
        b.frames();
        a.send(b.mac, "a protocol that guests do not speak");
        let arp = [
            &[0xff; 6][..],
            &a.mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &a.mac,
            &[0; 20],
        ]
        .concat();
        a.send_frame(&arp);
        let came = b.next_frame(|frame| frame[6..12] == a.mac).unwrap();
        assert_eq!(came[12..14], [8, 6], "only the frame that is in order came");
        let id = a.port.id;
        drop(a);
        network.remove_policy(id).unwrap();
        assert!(!ip_output("link").contains(" gi"), "nothing of it is left");
    });
}
