//! DHCP for IPv4, out of a port's allocation: a guest gets its one address, or none.
//!
//! Sources: RFC 2131 (protocol), RFC 2132 (options), RFC 3397 (search), RFC 3442 (classless routes), RFC 6842 (client identifier).
//!
//! There is no state: an address is its port's whether it is asked for or not, and every host answers from the same server
//! identifier, so a lease that was given by one host is renewed by another.

use std::net::{IpAddr, Ipv4Addr};

use model::{
    Mac,
    addressing::{Addressing, MetadataAccess},
    order::PortUse,
};
use smoltcp::wire::{DhcpMessageType as Kind, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use crate::{
    Guest, SERVICE_V4,
    frame::{BROADCAST, Datagram, Frame, IPV4, ethernet},
};

pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const MAGIC: u32 = 0x6382_5363;
/// Options (RFC 2132 and those above).
const MASK: u8 = 1;
const ROUTER: u8 = 3;
const NAME_SERVERS: u8 = 6;
const HOST_NAME: u8 = 12;
const DOMAIN: u8 = 15;
const MTU: u8 = 26;
const BROADCAST_ADDRESS: u8 = 28;
const REQUESTED: u8 = 50;
const KIND: u8 = 53;
const SERVER: u8 = 54;
const RENEWAL: u8 = 58;
const REBINDING: u8 = 59;
const CLIENT_ID: u8 = 61;
const SEARCH: u8 = 119;
const ROUTES: u8 = 121;
/// Longest answer: what every client takes (RFC 2131, section 2), less IP and UDP headers.
const MESSAGE_BYTES_MAX: usize = 576 - 28;
const MESSAGE_BYTES_MIN: usize = 300;

/// What a client says.
struct Asked {
    kind: Kind,
    transaction: u32,
    broadcast: bool,
    /// The address that it has already.
    has: Ipv4Addr,
    /// The address that it would like.
    would: Option<Ipv4Addr>,
    /// Which server it means.
    server: Option<Ipv4Addr>,
    client: Option<Vec<u8>>,
}

/// The answer to a frame that may be a client's question; `None` where there is none to give.
pub(crate) fn answer(guest: &Guest, frame: &Frame<'_>) -> Option<Vec<u8>> {
    let port = guest.port();
    let datagram = Datagram::of(frame.payload)?;
    if datagram.to.1 != SERVER_PORT || datagram.from.1 != CLIENT_PORT {
        return None;
    }
    // By the port's own address, or as one that has none yet.
    if ![Ipv4Addr::UNSPECIFIED, port.ip].contains(&datagram.from.0) {
        return None;
    }
    let asked = read(port.mac, datagram.payload)?;
    let kind = verdict(port, &asked)?;
    Some(reply(guest, &asked, kind))
}

/// What a message asks, if it is sound, not relayed, and about the guest's own card.
fn read(mac: Mac, bytes: &[u8]) -> Option<Asked> {
    let packet = DhcpPacket::new_checked(bytes).ok()?;
    let sound = bytes[..3] == [1, 1, 6] && packet.magic_number() == MAGIC;
    let own = packet.client_hardware_address().0 == mac.0 && packet.relay_agent_ip().is_unspecified();
    if !sound || !own {
        return None;
    }
    let mut asked = Asked {
        kind: Kind::Unknown(0),
        transaction: packet.transaction_id(),
        broadcast: packet.flags().bits() & 0x8000 != 0,
        has: packet.client_ip(),
        would: None,
        server: None,
        client: None,
    };
    let ip = |data: &[u8]| <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
    for DhcpOption { kind, data } in packet.options() {
        match (kind, data) {
            (KIND, &[code]) => asked.kind = Kind::from(code),
            (REQUESTED, data) => asked.would = Some(ip(data)?),
            (SERVER, data) => asked.server = Some(ip(data)?),
            (CLIENT_ID, data) if data.len() >= 2 => asked.client = Some(data.to_vec()),
            _ => {}
        }
    }
    Some(asked)
}

/// With what a question is answered (RFC 2131, section 4.3).
fn verdict(port: &PortUse, asked: &Asked) -> Option<Kind> {
    // One who means another server is not ours to answer.
    if asked.server.is_some_and(|server| server != SERVICE_V4) {
        return None;
    }
    match asked.kind {
        Kind::Discover => Some(Kind::Offer),
        Kind::Request => {
            // Selecting and after a reboot by option, renewing and rebinding by what it has.
            let wanted = asked.would.unwrap_or(asked.has);
            let right = wanted == port.ip && (asked.has.is_unspecified() || asked.has == port.ip);
            Some(if right { Kind::Ack } else { Kind::Nak })
        }
        Kind::Inform => (asked.has == port.ip).then_some(Kind::Ack),
        // An address is its port's: there is nothing to give back, and one that is in use elsewhere is not replaced.
        _ => None,
    }
}

fn reply(guest: &Guest, asked: &Asked, kind: Kind) -> Vec<u8> {
    let port = guest.port();
    let informs = asked.kind == Kind::Inform;
    let refuses = kind == Kind::Nak;
    let mut options = if refuses { vec![] } else { options(guest) };
    let lease = (!refuses && !informs).then_some(port.addressing.lease_s);
    if let Some(lease) = lease {
        options.push((RENEWAL, (lease / 2).to_be_bytes().to_vec()));
        options.push((REBINDING, (lease / 8 * 7).to_be_bytes().to_vec()));
    }
    if let Some(client) = &asked.client {
        options.push((CLIENT_ID, client.clone()));
    }
    let given = options.iter().map(|(kind, data)| DhcpOption { kind: *kind, data });
    let given: Vec<DhcpOption<'_>> = given.collect();
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction,
        secs: 0,
        client_hardware_address: EthernetAddress(port.mac.0),
        client_ip: if refuses { Ipv4Addr::UNSPECIFIED } else { asked.has },
        your_ip: if refuses || informs {
            Ipv4Addr::UNSPECIFIED
        } else {
            port.ip
        },
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(SERVICE_V4),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: lease,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &given,
    };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..]))
        .expect("a buffer of a message's length holds it");
    // What BOOTP relays and old clients expect at least (RFC 1542, section 2.1).
    message.resize(message.len().max(MESSAGE_BYTES_MIN), 0);
    // RFC 2131, section 4.1. A guest that has no address yet is reached by its MAC.
    let (to, ip) = match () {
        () if refuses || asked.broadcast => (BROADCAST, Ipv4Addr::BROADCAST),
        () => (port.mac, port.ip),
    };
    let datagram = Datagram {
        from: (SERVICE_V4, SERVER_PORT),
        to: (ip, CLIENT_PORT),
        payload: &message,
    };
    ethernet(to, IPV4, &datagram.packet())
}

/// What a guest is told, whether it asks for it or not: as much of it as every client takes.
fn options(guest: &Guest) -> Vec<(u8, Vec<u8>)> {
    let port = guest.port();
    let Addressing {
        dns, search, metadata, ..
    } = &port.addressing;
    let mask = u32::MAX.checked_shl(32 - u32::from(port.prefix.min(32))).unwrap_or(0);
    let mut all = vec![
        (MASK, mask.to_be_bytes().to_vec()),
        (BROADCAST_ADDRESS, (port.ip.to_bits() | !mask).to_be_bytes().to_vec()),
        (MTU, port.mtu.to_be_bytes().to_vec()),
        (HOST_NAME, guest.name.as_str().as_bytes().to_vec()),
    ];
    let mut routes = vec![];
    if *metadata != MetadataAccess::Off || port.addressing.method == model::addressing::AddressingMethod::Dhcp {
        // The services are on the guest's own link, whatever its way out is.
        routes.push(32);
        routes.extend_from_slice(&SERVICE_V4.octets());
        routes.extend_from_slice(&[0; 4]);
    }
    if let Some(gateway) = port.gateway {
        all.push((ROUTER, gateway.octets().to_vec()));
        // Who reads these does not read the router.
        routes.push(0);
        routes.extend_from_slice(&gateway.octets());
    }
    if !routes.is_empty() {
        all.push((ROUTES, routes));
    }
    let servers = dns.iter().filter_map(|ip| match ip {
        IpAddr::V4(ip) => Some(ip.octets()),
        IpAddr::V6(_) => None,
    });
    let servers: Vec<u8> = servers.flatten().collect();
    if !servers.is_empty() {
        all.push((NAME_SERVERS, servers));
    }
    if let Some(search) = search {
        all.push((DOMAIN, search.as_bytes().to_vec()));
        all.push((SEARCH, domain_bytes(search)));
    }
    let mut room = MESSAGE_BYTES_MAX - 300;
    all.retain(|(_, data)| {
        let fits = data.len() <= 255 && data.len() + 2 <= room;
        room -= if fits { data.len() + 2 } else { 0 };
        fits
    });
    all
}

/// A domain as labels with their lengths (RFC 1035, section 3.1).
pub(crate) fn domain_bytes(domain: &str) -> Vec<u8> {
    let mut bytes = vec![];
    for label in domain.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes
}
