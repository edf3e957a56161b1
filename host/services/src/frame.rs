//! Ethernet frames, IP and UDP around what the services say.

use std::net::{Ipv4Addr, Ipv6Addr};

use model::Mac;
use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, UdpPacket, UdpRepr};

use crate::SERVICE_MAC;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_BYTES: usize = 14;
/// Shortest frame; virtual links do not pad.
const FRAME_BYTES_MIN: usize = 60;
pub(crate) const BROADCAST: Mac = Mac([0xff; 6]);
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
const HOP_LIMIT: u8 = 64;

/// A frame's parts. Frames with VLAN tags are none of ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'f> {
    pub(crate) from: Mac,
    pub(crate) ethertype: u16,
    pub(crate) payload: &'f [u8],
}

impl<'f> Frame<'f> {
    /// The parts of a frame that is long enough to have them.
    pub(crate) fn of(bytes: &'f [u8]) -> Option<Self> {
        let (header, payload) = bytes.split_at_checked(ETHERNET_BYTES)?;
        Some(Self {
            from: Mac(header[6..12].try_into().ok()?),
            ethertype: u16::from_be_bytes(header[12..14].try_into().ok()?),
            payload,
        })
    }
}

/// A frame from here.
pub(crate) fn ethernet(to: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_BYTES_MIN.max(ETHERNET_BYTES + payload.len()));
    frame.extend_from_slice(&to.0);
    frame.extend_from_slice(&SERVICE_MAC.0);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
    frame
}

/// A UDP datagram over IPv4.
pub(crate) struct Datagram<'d> {
    pub(crate) from: (Ipv4Addr, u16),
    pub(crate) to: (Ipv4Addr, u16),
    pub(crate) payload: &'d [u8],
}

impl<'d> Datagram<'d> {
    /// The datagram in an IPv4 packet that is whole. Its UDP checksum counts for nothing: guests leave that to their network card,
    /// which is the host's memory.
    pub(crate) fn of(packet: &'d [u8]) -> Option<Self> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        let whole = !ip.more_frags() && ip.frag_offset() == 0 && ip.verify_checksum();
        if !whole || ip.next_header() != IpProtocol::Udp || ip.version() != 4 {
            return None;
        }
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let udp = UdpPacket::new_checked(ip.payload()).ok()?;
        let (source, destination, length) = (udp.src_port(), udp.dst_port(), usize::from(udp.len()));
        // By the slice that lives as long as the frame.
        let start = usize::from(ip.header_len()) + 8;
        Some(Self {
            from: (from, source),
            to: (to, destination),
            payload: packet.get(start..start + length.checked_sub(8)?)?,
        })
    }

    /// The IPv4 packet.
    pub(crate) fn packet(&self) -> Vec<u8> {
        let udp = UdpRepr {
            src_port: self.from.1,
            dst_port: self.to.1,
        };
        let length = udp.header_len() + self.payload.len();
        let ip = Ipv4Repr {
            src_addr: self.from.0,
            dst_addr: self.to.0,
            next_header: IpProtocol::Udp,
            payload_len: length,
            hop_limit: HOP_LIMIT,
        };
        let checksums = smoltcp::phy::ChecksumCapabilities::default();
        let mut bytes = vec![0; ip.buffer_len() + length];
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
        ip.emit(&mut packet, &checksums);
        udp.emit(
            &mut UdpPacket::new_unchecked(packet.payload_mut()),
            &IpAddress::Ipv4(ip.src_addr),
            &IpAddress::Ipv4(ip.dst_addr),
            self.payload.len(),
            |to| to.copy_from_slice(self.payload),
            &checksums,
        );
        bytes
    }
}

/// An ICMPv6 message in an IPv6 packet, by the hop limit of those that never pass a router (RFC 4861, section 6.1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Icmp6<'m> {
    pub(crate) from: Ipv6Addr,
    pub(crate) message: &'m [u8],
}

impl<'m> Icmp6<'m> {
    pub(crate) fn of(packet: &'m [u8]) -> Option<Self> {
        let ip = Ipv6Packet::new_checked(packet).ok()?;
        if ip.version() != 6 || ip.next_header() != IpProtocol::Icmpv6 || ip.hop_limit() != 255 {
            return None;
        }
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let end = 40 + usize::from(ip.payload_len());
        let message = packet.get(40..end)?;
        let sound = message.len() >= 8 && checksum(from, to, message) == 0;
        sound.then_some(Self { from, message })
    }

    /// The IPv6 packet around a message, whose bytes 2 and 3 become its checksum.
    pub(crate) fn packet(from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
        message[2..4].copy_from_slice(&[0, 0]);
        let sum = checksum(from, to, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let length = u16::try_from(message.len()).unwrap_or(u16::MAX).to_be_bytes();
        let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], 58, 255];
        packet.extend_from_slice(&from.octets());
        packet.extend_from_slice(&to.octets());
        packet.extend_from_slice(&message);
        packet
    }
}

/// RFC 1071, over the pseudo-header of RFC 8200, section 8.1.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let pseudo = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, 58]].concat();
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = pseudo.chunks(2).chain(message.chunks(2)).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
