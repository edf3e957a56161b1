//! The frames by which a network learns where a guest is now: RARP for switches, gratuitous ARP and unsolicited
//! neighbour advertisements for those who keep its address in a table.
//!
//! Sources: RFC 903 (RARP), RFC 5227 section 2.3 (ARP announcement), RFC 4861 section 7.2.6 (unsolicited advertisement).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use model::Mac;

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;
const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// Shortest Ethernet frame without its checksum; shorter ones are padded here, since virtual links do not.
const FRAME_BYTES_MIN: usize = 60;
/// How many addresses of a port are announced; more than these are reached by ordinary resolution.
const ADDRESSES_MAX: usize = 16;

/// A port's announcement, built before the blackout so that sending is all that is left inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    mac: Mac,
    frames: Vec<Vec<u8>>,
}

impl Announcement {
    /// Builds the frames for a guest's MAC and its addresses (at most 16 of them are announced).
    #[must_use]
    pub fn new(mac: Mac, addresses: &[IpAddr]) -> Self {
        let from = mac.0;
        let rarp = arp(ETHERTYPE_RARP, RARP_REQUEST, from, from, Ipv4Addr::UNSPECIFIED);
        let of_address = addresses.iter().take(ADDRESSES_MAX).map(|address| match address {
            IpAddr::V4(ip) => arp(ETHERTYPE_ARP, ARP_REQUEST, from, [0; 6], *ip),
            IpAddr::V6(ip) => neighbour_advertisement(from, *ip),
        });
        Self {
            mac,
            frames: std::iter::once(rarp).chain(of_address).collect(),
        }
    }

    /// The guest's MAC.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Whole Ethernet frames, in the order in which they are sent: the RARP first.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(Vec::as_slice)
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + payload.len().max(FRAME_BYTES_MIN - 14));
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(frame.len().max(FRAME_BYTES_MIN), 0);
    frame
}

/// Sender and target protocol address are both `ip`.
fn arp(ethertype: u16, operation: u16, mac: [u8; 6], target: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend_from_slice(&operation.to_be_bytes());
    packet.extend_from_slice(&mac);
    packet.extend_from_slice(&ip.octets());
    packet.extend_from_slice(&target);
    packet.extend_from_slice(&ip.octets());
    ethernet(BROADCAST, mac, ethertype, &packet)
}

fn neighbour_advertisement(mac: [u8; 6], ip: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    const ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend_from_slice(&ip.octets());
    message.extend_from_slice(&TARGET_LINK_ADDRESS);
    message.extend_from_slice(&mac);

    let len = message.len() as u8;
    let mut pseudo = Vec::with_capacity(40 + message.len());
    pseudo.extend_from_slice(&ip.octets());
    pseudo.extend_from_slice(&ALL_NODES.octets());
    pseudo.extend_from_slice(&[0, 0, 0, len, 0, 0, 0, ICMPV6]);
    pseudo.extend_from_slice(&message);
    let checksum = internet_checksum(&pseudo);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = vec![0x60, 0, 0, 0, 0, len, ICMPV6, 255];
    packet.extend_from_slice(&ip.octets());
    packet.extend_from_slice(&ALL_NODES.octets());
    packet.extend_from_slice(&message);
    ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6, &packet)
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    #[test]
    fn a_rarp_and_one_frame_per_address_are_built() {
        let announcement = Announcement::new(
            Mac(MAC),
            &[Ipv4Addr::new(10, 0, 0, 7).into(), "2001:db8::7".parse().unwrap()],
        );
        let frames: Vec<&[u8]> = announcement.frames().collect();
        assert_eq!(frames.len(), 3);
        assert!(
            frames
                .iter()
                .all(|frame| frame.len() >= FRAME_BYTES_MIN && frame[6..12] == MAC)
        );
        assert_eq!(frames[0][12..14], [0x80, 0x35]);
        assert_eq!(frames[0][20..22], [0, 3], "reverse request");
        assert_eq!(frames[0][32..38], MAC, "the target of a RARP is the sender itself");
        assert_eq!(frames[1][12..14], [0x08, 0x06]);
        assert_eq!(
            frames[1][28..32],
            frames[1][38..42],
            "sender and target address are equal"
        );
        assert_eq!(frames[1][28..32], [10, 0, 0, 7]);
    }

    #[test]
    fn the_neighbour_advertisements_checksum_verifies() {
        let frame = neighbour_advertisement(MAC, "fe80::1".parse().unwrap());
        let (ip, message) = (&frame[14..54], &frame[54..86]);
        let mut pseudo = ip[8..40].to_vec();
        pseudo.extend_from_slice(&[0, 0, 0, 32, 0, 0, 0, 58]);
        pseudo.extend_from_slice(message);
        assert_eq!(internet_checksum(&pseudo), 0, "a correct checksum sums to nothing");
    }

    #[test]
    fn a_port_with_a_thousand_addresses_is_announced_within_the_bound() {
        let addresses: Vec<IpAddr> = (0..1000u32).map(|n| Ipv4Addr::from(n).into()).collect();
        assert_eq!(
            Announcement::new(Mac(MAC), &addresses).frames().count(),
            1 + ADDRESSES_MAX
        );
    }
}
