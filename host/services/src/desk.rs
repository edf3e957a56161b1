//! A port's desk: takes its guest's frames, and has the answers.

use std::time::Duration;

use model::{
    Mac,
    addressing::{AddressingMethod, MetadataAccess, link_local},
};
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};

use crate::{
    Guest, Key, SERVICE_V4, SERVICE_V6, Told, advert,
    advert::Schedule,
    bucket::Bucket,
    dhcp,
    frame::{ARP, Frame, IPV4, IPV6, Icmp6, ethernet},
    http::{Reply, Request},
    metadata::{self, Verdict},
    neighbour,
    tcp::{self, Stack},
};

/// Answers to questions about addresses: at once, and a second.
const ANSWERS: (u32, u32) = (16, 8);
/// Packets of connections: at once, and a second.
const PACKETS: (u32, u32) = (512, 2000);
/// A desk keeps what is needed for connections this long after the last.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A port's desk. Times are since any fixed moment.
pub struct Desk {
    guest: Guest,
    key: Key,
    seed: u64,
    answers: Bucket,
    packets: Bucket,
    adverts: Option<Schedule>,
    stack: Option<Box<Stack>>,
    told: Option<Told>,
    unknown: bool,
}

impl Desk {
    /// A desk for a guest. The seed is random: it makes TCP's first numbers hard to guess.
    #[must_use]
    pub fn new(guest: Guest, key: Key, seed: u64, now: Duration) -> Self {
        let port = guest.port();
        Self {
            adverts: port.addressing.v6.map(|_| Schedule::new(port.mac, now)),
            answers: Bucket::new(ANSWERS.0, ANSWERS.1, now),
            packets: Bucket::new(PACKETS.0, PACKETS.1, now),
            guest,
            key,
            seed,
            stack: None,
            told: None,
            unknown: false,
        }
    }

    /// Whom it serves.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Takes a frame that the guest sent; frames for it are added to `out`.
    pub fn take(&mut self, bytes: &[u8], now: Duration, out: &mut Vec<Vec<u8>>) {
        let Some(frame) = Frame::of(bytes) else { return };
        if frame.from != self.guest.port().mac {
            return;
        }
        if let Some(packet) = self.for_tcp(&frame) {
            if self.packets.take(now) {
                let (mtu, seed) = (self.guest.port().mtu, self.seed);
                let stack = self.stack.get_or_insert_with(|| Box::new(Stack::new(mtu, seed, now)));
                stack.take(packet, now);
                self.turn(now, out);
            }
            return;
        }
        if let Some(answer) = self.answer(&frame)
            && self.answers.take(now)
        {
            out.push(answer);
        }
    }

    /// Does what is due; frames for the guest are added to `out`.
    pub fn tick(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        if self.adverts.as_mut().is_some_and(|schedule| schedule.take(now)) {
            out.extend(advert::frame(self.guest.port()));
        }
        self.turn(now, out);
        if self
            .stack
            .as_ref()
            .and_then(|stack| stack.idle(now))
            .is_some_and(|idle| idle >= IDLE_MAX)
        {
            self.stack = None;
            self.told = None;
        }
    }

    /// When [`Desk::tick`] is due.
    pub fn due(&mut self, now: Duration) -> Option<Duration> {
        let advert = self.adverts.map(|schedule| schedule.next());
        let stack = self.stack.as_mut().and_then(|stack| match stack.idle(now) {
            Some(idle) => Some(now + IDLE_MAX.saturating_sub(idle)),
            None => stack.due(now),
        });
        advert.into_iter().chain(stack).min()
    }

    /// Whether a request waits for [`Desk::tell`].
    #[must_use]
    pub fn asks(&self) -> bool {
        self.told.is_none() && self.stack.as_ref().is_some_and(|stack| stack.waits())
    }

    /// What the guest was told, or that nobody can say so now: then those who wait are told that. Frames for it are added to `out`.
    pub fn tell(&mut self, told: Option<Told>, now: Duration, out: &mut Vec<Vec<u8>>) {
        self.unknown = told.is_none();
        self.told = told;
        self.turn(now, out);
        self.unknown = false;
    }

    fn turn(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        let Some(stack) = &mut self.stack else { return };
        let (guest, told, key, unknown) = (&self.guest, self.told.as_ref(), &self.key, self.unknown);
        let decide = |request: &Request| match metadata::answer(guest, told, key, request, now) {
            Verdict::NeedsTold if unknown => Verdict::Reply(Reply::status(503)),
            verdict => verdict,
        };
        let mut packets = vec![];
        stack.turn(now, &decide, &mut packets);
        let mac = guest.port().mac;
        out.extend(packets.iter().map(|packet| framed(mac, packet)));
    }

    /// A packet of a connection of this guest's, by its own addresses.
    fn for_tcp(&self, frame: &Frame<'_>) -> Option<Vec<u8>> {
        let port = self.guest.port();
        if port.addressing.metadata == MetadataAccess::Off {
            return None;
        }
        match frame.ethertype {
            IPV4 => {
                let ip = Ipv4Packet::new_checked(frame.payload).ok()?;
                let whole = !ip.more_frags() && ip.frag_offset() == 0;
                let own = ip.src_addr() == port.ip && ip.dst_addr() == SERVICE_V4;
                let to_us = whole && own && ip.next_header() == IpProtocol::Tcp && to_port(ip.payload());
                to_us.then(|| frame.payload[..usize::from(ip.total_len())].to_vec())
            }
            IPV6 => {
                let ip = Ipv6Packet::new_checked(frame.payload).ok()?;
                let own = [port.v6?, link_local(port.mac)].contains(&ip.src_addr()) && ip.dst_addr() == SERVICE_V6;
                let to_us = own && ip.next_header() == IpProtocol::Tcp && to_port(ip.payload());
                to_us.then(|| frame.payload[..ip.total_len()].to_vec())
            }
            _ => None,
        }
    }

    /// The answer to a question about addresses.
    fn answer(&self, frame: &Frame<'_>) -> Option<Vec<u8>> {
        let port = self.guest.port();
        let told = &port.addressing;
        let dhcp = told.method == AddressingMethod::Dhcp;
        match frame.ethertype {
            ARP if dhcp || told.metadata != MetadataAccess::Off => neighbour::arp(port, frame),
            IPV4 if dhcp => dhcp::answer(&self.guest, frame),
            IPV6 => {
                let asked = Icmp6::of(frame.payload)?;
                if advert::is_solicitation(&asked) {
                    return advert::frame(port);
                }
                (told.metadata != MetadataAccess::Off)
                    .then(|| neighbour::advertisement(port, &asked))
                    .flatten()
            }
            _ => None,
        }
    }
}

fn to_port(segment: &[u8]) -> bool {
    TcpPacket::new_checked(segment).is_ok_and(|tcp| tcp.dst_port() == tcp::PORT)
}

fn framed(mac: Mac, packet: &[u8]) -> Vec<u8> {
    let kind = if packet.first().is_some_and(|first| first >> 4 == 6) {
        IPV6
    } else {
        IPV4
    };
    ethernet(mac, kind, packet)
}
