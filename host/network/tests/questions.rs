//! Promises about what guests ask their host: it is heard, answered to the guest alone, and goes no further.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{cell::Cell, time::Instant};

use network::{Answered, Network, Questions};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use support::{DEADLINE, Guest, bridge, in_namespace, mac};

const EVERYONE: [u8; 6] = [0xff; 6];
const SERVICE: [u8; 4] = [169, 254, 169, 254];
const SERVICE_V6: [u8; 16] = [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x54];

fn udp(to: [u8; 4], port: u8) -> Vec<u8> {
    let mut packet = vec![8, 0, 0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 2];
    packet.extend(to);
    packet.extend([0, 68, 0, port, 0, 16, 0, 0]);
    // A bridge may look at it, cut off what is more than the packet says that it has, and drop one that does not add up.
    let words = packet[2..22]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[12..14].copy_from_slice(&sum.to_be_bytes());
    packet.resize(2 + 36, 7);
    packet
}

fn arp(target: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![
        8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0,
    ];
    packet.extend(target);
    packet
}

fn ipv6(to: [u8; 16], next: u8, message: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, next, 255];
    packet.extend([0xfe; 16]);
    packet.extend(to);
    packet.extend(message);
    packet.resize(2 + 40 + 32, 0);
    packet
}

fn solicitation(kind: u8, target: [u8; 16]) -> Vec<u8> {
    let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target].concat();
    ipv6([0xff; 16], 58, &message)
}

/// What the guest sent last as heard, without its MACs.
fn heard(questions: &mut Questions) -> Vec<Vec<u8>> {
    let mut all = vec![];
    while let Some(frame) = questions.next_frame().unwrap() {
        all.push(frame[12..].to_vec());
    }
    all
}

fn send(guest: &Guest, tail: &[u8]) {
    guest.send_frame(&[&EVERYONE[..], &guest.mac, tail].concat());
}

fn hear(network: &Network, guest: &Guest) -> Questions {
    network.hear(&guest.port).unwrap()
}

#[test]
fn questions_are_heard_and_nothing_else() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        let other = Guest::open(&network, "br0", 2);
        let mut questions = hear(&network, &guest);
        let asked = [
            udp([255; 4], 67),
            udp(SERVICE, 80),
            arp(SERVICE),
            solicitation(133, [0; 16]),
            solicitation(135, SERVICE_V6),
            ipv6(SERVICE_V6, 6, &[]),
        ];
        let not_asked = [
            udp([255; 4], 68),
            udp([10, 0, 0, 1], 80),
            arp([10, 0, 0, 1]),
            solicitation(134, [0; 16]),
            solicitation(135, [0xfd; 16]),
            ipv6([0xfd; 16], 6, &[]),
            vec![0x88, 0xb5],
        ];
        for frame in asked.iter().chain(&not_asked) {
            send(&guest, frame);
            // What others ask reaches this port from the bridge, and is not its guest's question.
            send(&other, frame);
        }
        let heard: Vec<_> = heard(&mut questions);
        assert_eq!(heard.len(), asked.len());
        for (heard, asked) in heard.iter().zip(&asked) {
            assert_eq!(heard[..asked.len()], asked[..]);
        }
        // The answer is the guest's alone.
        drop((guest.queued(), other.queued()));
        questions
            .answer(&[&guest.mac[..], &mac(9), &[0x88, 0xb5], b"an answer", &[0; 60]].concat())
            .unwrap();
        assert_eq!(guest.receive(), "an answer");
        assert!(other.queued().is_empty());
    });
}

#[test]
fn what_is_answered_goes_no_further_and_what_is_not_does() {
    in_namespace(|network| {
        for _ in 0..2 {
            network.ensure_answers().unwrap();
        }
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        let server = Guest::open(&network, "br0", 2);
        let dhcp = udp([255; 4], 67);
        let metadata = [udp(SERVICE, 80), arp(SERVICE), ipv6(SERVICE_V6, 6, &[])];
        // Each sends what it is tested with, then a word, after which all before it has come or will not.
        let reaches = |tail: &[u8]| {
            send(&guest, tail);
            guest.send(EVERYONE, "end");
            let came = Cell::new(false);
            server.next_frame(|frame| {
                came.set(came.get() || frame[12..].starts_with(tail));
                frame[12..].starts_with(b"\x88\xb5end")
            });
            came.get()
        };
        for (answered, dhcp_passes, metadata_passes) in [
            (Answered::Nothing, true, true),
            (Answered::Metadata, true, false),
            (Answered::Dhcp, false, false),
            (Answered::Nothing, true, true),
        ] {
            network.set_answered(&guest.port, answered).unwrap();
            assert_eq!(reaches(&dhcp), dhcp_passes, "{answered:?}");
            for frame in &metadata {
                assert_eq!(reaches(frame), metadata_passes, "{answered:?} {frame:02x?}");
            }
        }
        // It is heard all the same.
        network.set_answered(&guest.port, Answered::Dhcp).unwrap();
        let mut questions = hear(&network, &guest);
        assert!(!reaches(&dhcp));
        assert_eq!(heard(&mut questions).len(), 1);
    });
}

#[test]
fn a_port_that_is_gone_is_told_once_and_for_all() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        let mut questions = hear(&network, &guest);
        let port = guest.port.clone();
        drop(guest);
        let end = Instant::now() + DEADLINE;
        while !questions.is_ended() {
            assert!(Instant::now() < end, "the end is not told");
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            poll(&mut [PollFd::new(&questions, PollFlags::IN)], Some(&wait)).unwrap();
            assert_eq!(questions.next_frame().unwrap(), None);
        }
        assert!(network.hear(&port).is_err());
    });
}
