//! Router advertisements: the prefix of a network, its MTU and name servers, and its router where it has one.
//!
//! Sources: RFC 4861 sections 4.2 and 6.2, RFC 4862, RFC 8106 (name servers and domain).

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use model::{Mac, addressing::V6_PREFIX_LENGTH, order::PortUse};

use crate::{
    dhcp::domain_bytes,
    frame::{IPV6, Icmp6, ethernet},
};

const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
/// Who advertises a network that has no router: the same address on every host.
const NO_ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe);
/// Between two that nobody asked for (RFC 4861, section 6.2.1: MinRtrAdvInterval and MaxRtrAdvInterval).
const EVERY_MIN: Duration = Duration::from_secs(198);
const EVERY_MAX: Duration = Duration::from_secs(600);
/// The first one after a desk opens.
const FIRST: Duration = Duration::from_secs(1);
/// Lifetimes, seconds. A router and name servers are forgotten after three advertisements that did not come.
const ROUTER_S: u16 = 1800;
const VALID_S: u32 = 86_400;
const PREFERRED_S: u32 = 14_400;
const HOP_LIMIT: u8 = 64;
/// On-link, and good for making addresses (RFC 4861, section 4.6.2).
const PREFIX_FLAGS: u8 = 0xc0;

/// When the next one is due that nobody asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    next: Duration,
    every: Duration,
}

impl Schedule {
    /// Each port at its own pace, so that guests are not all told at once.
    pub(crate) fn new(mac: Mac, now: Duration) -> Self {
        let spread = u64::from(u16::from_be_bytes([mac.0[4], mac.0[5]]));
        let between = (EVERY_MAX - EVERY_MIN).as_secs();
        Self {
            next: now + FIRST,
            every: EVERY_MIN + Duration::from_secs(spread % between),
        }
    }

    pub(crate) const fn next(&self) -> Duration {
        self.next
    }

    /// Whether one is due now; the next one is later.
    pub(crate) fn take(&mut self, now: Duration) -> bool {
        let due = now >= self.next;
        if due {
            self.next = now + self.every;
        }
        due
    }
}

/// Whether this is a guest's question for routers.
pub(crate) fn is_solicitation(asked: &Icmp6<'_>) -> bool {
    asked.message[0] == SOLICITATION && asked.message[1] == 0
}

/// An advertisement for all on the link, which is the guest alone; `None` where the network has no prefix.
pub(crate) fn frame(port: &PortUse) -> Option<Vec<u8>> {
    let told = &port.addressing;
    let prefix = told.v6?;
    let router = if prefix.gateway.is_some() { ROUTER_S } else { 0 };
    let [high, low] = router.to_be_bytes();
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, 0, high, low];
    // Reachable and retransmission times are the guest's own business.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[5, 1, 0, 0]);
    message.extend_from_slice(&u32::from(port.mtu).to_be_bytes());
    message.extend_from_slice(&[3, 4, V6_PREFIX_LENGTH, PREFIX_FLAGS]);
    message.extend_from_slice(&VALID_S.to_be_bytes());
    message.extend_from_slice(&PREFERRED_S.to_be_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&prefix.address.octets());
    let servers: Vec<Ipv6Addr> = told
        .dns
        .iter()
        .filter_map(|ip| match ip {
            IpAddr::V6(ip) => Some(*ip),
            IpAddr::V4(_) => None,
        })
        .collect();
    if !servers.is_empty() {
        let bytes: Vec<u8> = servers.iter().flat_map(Ipv6Addr::octets).collect();
        option(&mut message, 25, &bytes);
    }
    if let Some(search) = &told.search {
        option(&mut message, 31, &domain_bytes(search));
    }
    let from = prefix.gateway.unwrap_or(NO_ROUTER);
    Some(ethernet(ALL_NODES_MAC, IPV6, &Icmp6::packet(from, ALL_NODES, message)))
}

/// An option with a lifetime, padded to whole units of eight bytes.
fn option(message: &mut Vec<u8>, kind: u8, bytes: &[u8]) {
    let units = (8 + bytes.len()).div_ceil(8);
    message.extend_from_slice(&[kind, u8::try_from(units).unwrap_or(u8::MAX), 0, 0]);
    message.extend_from_slice(&u32::from(ROUTER_S).to_be_bytes());
    message.extend_from_slice(bytes);
    message.resize(message.len() + units * 8 - 8 - bytes.len(), 0);
}
