//! Promises about what a guest misses while it stands: kept whole, given to it alone.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{
    os::fd::{AsFd, AsRawFd},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use model::{Mac, PortId};
use network::{FrameError, Keeper, KeptFrame, Network, VIRTIO_HEADER_BYTES};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use support::{DEADLINE, Guest, bridge, in_namespace, mac, name};
use uuid::Uuid;

const EVERYONE: [u8; 6] = [0xff; 6];

fn keep(network: &Network, guest: &Guest) -> Keeper {
    network.keep_frames(&guest.port, Mac(guest.mac)).unwrap()
}

fn all(keeper: &mut Keeper) -> Vec<KeptFrame> {
    std::iter::from_fn(|| keeper.next_frame().unwrap()).collect()
}

fn texts(frames: &[KeptFrame]) -> Vec<String> {
    let text = |frame: &KeptFrame| String::from_utf8_lossy(&frame.bytes[VIRTIO_HEADER_BYTES + 14..]).into_owned();
    frames
        .iter()
        .map(|frame| text(frame).trim_end_matches('\0').to_owned())
        .collect()
}

fn now_us() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

/// The same guest on another host.
fn elsewhere(network: &Network, bridge: &str, guest: &Guest) -> Guest {
    let tap = network.create_tap(PortId(Uuid::from_u128(1)), &name(bridge)).unwrap();
    Guest {
        port: tap.port,
        mac: guest.mac,
        fd: tap.fd,
    }
}

/// As QEMU does for a guest that takes segments and checksums left undone: `TUNSETOFFLOAD`.
#[allow(unsafe_code)]
fn take_large_frames(guest: &Guest) {
    let offloads: libc::c_ulong = libc::TUN_F_CSUM as libc::c_ulong | libc::TUN_F_TSO4 as libc::c_ulong;
    // SAFETY: the request takes a number, not a pointer.
    let done = unsafe { libc::ioctl(guest.fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads) };
    assert_eq!(done, 0);
}

/// All that a tap brings, header included.
fn raw(guest: &Guest) -> Vec<u8> {
    let end = Instant::now() + DEADLINE;
    let mut bytes = vec![0; 1 << 17];
    while Instant::now() < end {
        match rustix::io::read(&guest.fd, bytes.as_mut_slice()) {
            Ok(len) => return bytes[..len].to_vec(),
            Err(Errno::AGAIN) => {
                let wait = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                };
                poll(&mut [PollFd::new(&guest.fd, PollFlags::IN)], Some(&wait)).unwrap();
            }
            Err(errno) => panic!("reading a tap: {errno}"),
        }
    }
    panic!("no frame in time")
}

#[test]
fn what_is_sent_to_a_guest_that_reads_nothing_is_kept_in_order_and_is_still_there_when_it_reads_again() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let (client, guest) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        guest.queued();
        let before = now_us();
        let mut keeper = keep(&network, &guest);
        // More than a tap's queue takes.
        let sent: Vec<String> = (0..1500).map(|n| format!("frame {n}")).collect();
        for text in &sent {
            client.send(guest.mac, text);
        }
        let kept = all(&mut keeper);
        assert_eq!(texts(&kept), sent);
        assert!(kept.iter().all(|frame| (before..=now_us()).contains(&frame.at_us)));
        let queued = guest.queued();
        assert!(queued.len() >= 500, "{}", queued.len());
        assert_eq!(queued, sent[..queued.len()], "keeping takes nothing from the guest");
    });
}

#[test]
fn only_what_goes_to_the_guest_and_does_not_come_from_it_is_kept() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let (client, guest) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        let mut keeper = keep(&network, &guest);
        client.send(EVERYONE, "to all");
        client.send(mac(77), "flooded, for another");
        guest.send(client.mac, "from the guest");
        // Where it runs on its address is announced, and the bridge floods that to here.
        network.block_port(&guest.port).unwrap();
        network.open_port(&guest.port, &guest.announcement()).unwrap();
        let echo = Guest {
            mac: guest.mac,
            ..Guest::open(&network, "br0", 3)
        };
        echo.send(EVERYONE, "announced elsewhere");
        network.open_port(&guest.port, &guest.announcement()).unwrap();
        client.send(guest.mac, "to it");
        let kept = all(&mut keeper);
        let ours: Vec<_> = texts(&kept).into_iter().filter(|text| text.starts_with("to")).collect();
        assert_eq!(ours, ["to all", "to it"]);
        assert_eq!(
            kept.iter().map(KeptFrame::is_for_many).collect::<Vec<_>>()[..],
            [&[true][..], &vec![true; kept.len() - 2], &[false]].concat(),
            "the rest is the third guest's own announcement: {kept:?}"
        );
        assert!(
            kept.iter()
                .all(|frame| frame.bytes[VIRTIO_HEADER_BYTES + 6..][..6] != guest.mac)
        );
    });
}

#[test]
fn what_came_before_a_moment_is_forgotten_and_the_rest_outlives_the_port() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let (client, guest) = (Guest::open(&network, "br0", 1), Guest::open(&network, "br0", 2));
        let mut keeper = keep(&network, &guest);
        // The kernel begins to stamp frames a moment after the first socket asked for it; until then each is as new as can be.
        let end = Instant::now() + DEADLINE;
        loop {
            client.send(guest.mac, "old");
            let later = now_us() + 1;
            keeper.forget_before(later + 1_000_000).unwrap();
            client.send(guest.mac, "old");
            keeper.forget_before(later).unwrap();
            if keeper.next_frame().unwrap().is_some_and(|frame| frame.at_us >= later) {
                break;
            }
            assert!(Instant::now() < end, "frames are not stamped");
        }
        client.send(guest.mac, "old");
        let moment = now_us() + 1;
        while now_us() <= moment {}
        client.send(guest.mac, "new");
        keeper.forget_before(moment).unwrap();
        assert!(!keeper.is_ended());
        network.remove(guest.port.id).unwrap();
        assert_eq!(texts(&all(&mut keeper)), ["new"]);
        assert!(keeper.is_ended());
        let gone = network.give_frame(&guest.port, &[0; 64]).unwrap_err();
        assert!(matches!(gone, FrameError::Gone { .. }), "{gone}");
        assert!(matches!(
            network.keep_frames(&guest.port, Mac(guest.mac)),
            Err(FrameError::Gone { .. })
        ));
    });
}

#[test]
fn what_is_given_reaches_the_guest_and_nobody_else_and_moves_no_forwarding_entry() {
    in_namespace(|network| {
        for host in ["a", "b"] {
            bridge(&network, host);
        }
        let (client, before) = (Guest::open(&network, "a", 1), Guest::open(&network, "a", 2));
        let neighbour = Guest::open(&network, "b", 3);
        // Its port here is not open yet: what is given waits for the guest all the same.
        let after = elsewhere(&network, "b", &before);
        let mut keeper = keep(&network, &before);
        client.send(before.mac, "one");
        client.send(EVERYONE, "two");
        neighbour.queued();
        for frame in all(&mut keeper) {
            network.give_frame(&after.port, &frame.bytes).unwrap();
        }
        assert_eq!(after.queued(), ["one", "two"]);
        assert_eq!(neighbour.queued(), Vec::<String>::new());
        // Had its bridge learnt that the client is behind the guest's port, this would go there alone.
        network.open_port(&after.port, &after.announcement()).unwrap();
        let other = Guest::open(&network, "b", 4);
        neighbour.send(client.mac, "where is the client");
        assert_eq!(other.receive(), "where is the client");
    });
}

#[test]
fn a_frame_that_is_left_to_the_guest_to_cut_and_to_sum_up_arrives_as_it_was() {
    in_namespace(|network| {
        for host in ["a", "b"] {
            bridge(&network, host);
        }
        let (client, before) = (Guest::open(&network, "a", 1), Guest::open(&network, "a", 2));
        let after = elsewhere(&network, "b", &before);
        for guest in [&before, &after] {
            take_large_frames(guest);
        }
        before.queued();
        let mut keeper = keep(&network, &before);
        rustix::io::write(client.fd.as_fd(), &large_frame(client.mac, before.mac)).unwrap();
        let arrived = raw(&before);
        assert!(arrived.len() > 60_000, "{} bytes: it was cut on its way", arrived.len());
        let kept = all(&mut keeper);
        let kept = &kept.first().unwrap().bytes;
        assert_eq!(kept[VIRTIO_HEADER_BYTES..], arrived[VIRTIO_HEADER_BYTES..]);
        network.give_frame(&after.port, kept).unwrap();
        assert_eq!(raw(&after), arrived, "header and all");
    });
}

#[test]
fn what_is_no_frame_is_not_given() {
    in_namespace(|network| {
        bridge(&network, "br0");
        let guest = Guest::open(&network, "br0", 1);
        for len in [0, VIRTIO_HEADER_BYTES + 13, network::FRAME_BYTES_MAX + 1] {
            let error = network.give_frame(&guest.port, &vec![0; len]).unwrap_err();
            assert!(matches!(error, FrameError::Length { .. }), "{error}");
        }
        // A header that promises what the frame does not hold.
        let mut frame = vec![0; 100];
        frame[..VIRTIO_HEADER_BYTES].copy_from_slice(&[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let error = network.give_frame(&guest.port, &frame).unwrap_err();
        assert!(matches!(error, FrameError::Kernel { .. }), "{error}");
        assert_eq!(guest.queued(), Vec::<String>::new());
    });
}

/// A TCP segment of 60,000 bytes, to be cut into some of 1,448: virtio header, Ethernet, IPv4, TCP with its pseudo header's sum.
fn large_frame(from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
    const PAYLOAD: u16 = 60_000;
    let sum = |bytes: &[u8]| {
        let mut sum: u32 = bytes
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    };
    let mut ip = vec![0x45, 0];
    ip.extend((PAYLOAD + 40).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let check = !sum(&ip);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend((PAYLOAD + 20).to_be_bytes());
    let mut tcp = vec![0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0x20, 0];
    tcp.extend(sum(&pseudo).to_be_bytes());
    tcp.extend([0, 0]);
    // NEEDS_CSUM, GSO_TCPV4, then header length, segment size, start and offset of the checksum.
    let mut frame = vec![1, 1];
    for number in [54_u16, 1448, 34, 16] {
        frame.extend(number.to_le_bytes());
    }
    frame.extend(to);
    frame.extend(from);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(tcp);
    frame.extend((0..PAYLOAD).map(|n| n as u8));
    frame
}
