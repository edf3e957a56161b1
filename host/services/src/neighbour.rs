//! Who has the address of these services? The desk: for guests that look for it on their own link.
//!
//! Sources: RFC 826 (ARP), RFC 4861 section 7.2 (neighbour solicitation).

use model::order::PortUse;

use crate::{
    SERVICE_MAC, SERVICE_V4, SERVICE_V6,
    frame::{ARP, Frame, IPV6, Icmp6, ethernet},
};

const REQUEST: [u8; 2] = [0, 1];
/// Ethernet, IPv4, and the lengths of their addresses.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Solicited, override.
const FLAGS: u8 = 0x60;

/// The answer to an ARP request for the services' address, by the port's own addresses.
pub(crate) fn arp(port: &PortUse, frame: &Frame<'_>) -> Option<Vec<u8>> {
    let packet = frame.payload.get(..28)?;
    let (mac, ip) = (&packet[8..14], &packet[14..18]);
    let asks = packet[..6] == KIND && packet[6..8] == REQUEST && packet[24..28] == SERVICE_V4.octets();
    // A probe has no sender's address yet (RFC 5227); nobody probes for this one but to take it.
    if !asks || *mac != port.mac.0 || *ip != port.ip.octets() {
        return None;
    }
    let mut answer = KIND.to_vec();
    answer.extend_from_slice(&[0, 2]);
    answer.extend_from_slice(&SERVICE_MAC.0);
    answer.extend_from_slice(&SERVICE_V4.octets());
    answer.extend_from_slice(mac);
    answer.extend_from_slice(ip);
    Some(ethernet(port.mac, ARP, &answer))
}

/// The answer to a neighbour solicitation for the services' address.
pub(crate) fn advertisement(port: &PortUse, asked: &Icmp6<'_>) -> Option<Vec<u8>> {
    let target = asked.message.get(8..24)?;
    let own = [port.v6?, model::addressing::link_local(port.mac)].contains(&asked.from);
    if asked.message[0] != SOLICITATION || *target != SERVICE_V6.octets() || !own {
        return None;
    }
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, FLAGS, 0, 0, 0];
    message.extend_from_slice(&SERVICE_V6.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&SERVICE_MAC.0);
    let packet = Icmp6::packet(SERVICE_V6, asked.from, message);
    Some(ethernet(port.mac, IPV6, &packet))
}
