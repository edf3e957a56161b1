//! Network interfaces as the kernel describes them, and the requests that change them.

use std::net::IpAddr;

use rustix::io::Errno;

use crate::netlink::{self, Message, Netlink, NetlinkError, attributes};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWNEIGH: u16 = 28;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_STATS64: u16 = 23;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_GROUP: u16 = 27;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAG_NO_DAD: u8 = 0x02;
const SCOPE_LINK: u8 = 253;
const NDA_LLADDR: u16 = 2;
const NUD_REACHABLE: u16 = 2;
const NTF_MASTER: u8 = 4;

/// The port state in which a bridge neither takes frames in nor sends them out. Of the three that do so this is the one
/// that stays: `disabled` is undone by the next carrier notice, `blocking` at once, when spanning tree is off.
pub(crate) const PORT_LISTENING: u8 = 1;
/// The port state in which frames pass.
pub(crate) const PORT_FORWARDING: u8 = 3;

/// What is known of one interface.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) flags: u32,
    pub(crate) name: String,
    /// The driver kind (`bridge`, `tun`, `veth`), empty for hardware.
    pub(crate) kind: String,
    pub(crate) alias: String,
    pub(crate) mtu: u32,
    pub(crate) mac: [u8; 6],
    /// The bridge or bond it belongs to.
    pub(crate) master: Option<u32>,
    /// Whether the bridge runs spanning tree; `None` if it is not a bridge.
    pub(crate) spanning_tree: Option<bool>,
    /// The state as a bridge port; `None` if it is not one.
    pub(crate) port_state: Option<u8>,
    pub(crate) statistics: Statistics,
}

/// The interface's counters, from the host's point of view.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Statistics {
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_dropped: u64,
    pub(crate) tx_dropped: u64,
}

impl Link {
    pub(crate) fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }

    fn parse(payload: &[u8]) -> Option<Self> {
        let mut link = Self {
            index: u32_at(payload, 4)?,
            flags: u32_at(payload, 8)?,
            ..Self::default()
        };
        for (kind, value) in attributes(payload.get(16..)?) {
            match kind {
                IFLA_IFNAME => link.name = text(value),
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_MASTER => link.master = u32_at(value, 0),
                IFLA_ADDRESS if value.len() == 6 => link.mac.copy_from_slice(value),
                IFLA_STATS64 => link.statistics = Statistics::parse(value)?,
                IFLA_LINKINFO => link.parse_info(value),
                _ => {}
            }
        }
        Some(link)
    }

    fn parse_info(&mut self, info: &[u8]) {
        for (kind, value) in attributes(info) {
            match kind {
                IFLA_INFO_KIND => self.kind = text(value),
                IFLA_INFO_DATA if self.kind == "bridge" => {
                    let stp = attributes(value).find(|(kind, _)| *kind == IFLA_BR_STP_STATE);
                    self.spanning_tree = stp.and_then(|(_, v)| u32_at(v, 0)).map(|v| v != 0);
                }
                IFLA_INFO_SLAVE_DATA => {
                    let state = attributes(value).find(|(kind, _)| *kind == IFLA_BRPORT_STATE);
                    self.port_state = state.and_then(|(_, v)| v.first().copied());
                }
                _ => {}
            }
        }
    }
}

impl Statistics {
    /// The layout of `struct rtnl_link_stats64`.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let at = |i: usize| bytes.get(i * 8..i * 8 + 8)?.try_into().ok().map(u64::from_ne_bytes);
        Some(Self {
            rx_packets: at(0)?,
            tx_packets: at(1)?,
            rx_bytes: at(2)?,
            tx_bytes: at(3)?,
            rx_dropped: at(6)?,
            tx_dropped: at(7)?,
        })
    }
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    pub(crate) prefix: u8,
}

/// Looks an interface up by name.
pub(crate) fn find(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, NetlinkError> {
    one(
        netlink,
        &Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0, 0)).text(IFLA_IFNAME, name),
    )
}

/// Looks an interface up by index.
pub(crate) fn find_index(netlink: &mut Netlink, index: u32) -> Result<Option<Link>, NetlinkError> {
    one(netlink, &Message::new(RTM_GETLINK, 0, &link_header(0, index, 0, 0)))
}

fn one(netlink: &mut Netlink, message: &Message) -> Result<Option<Link>, NetlinkError> {
    match netlink.get(message) {
        Ok(payload) => Link::parse(&payload).map(Some).ok_or(NetlinkError::Malformed),
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All interfaces of the namespace.
pub(crate) fn all(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let payloads = netlink.dump(&Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0, 0)))?;
    payloads
        .iter()
        .map(|payload| Link::parse(payload).ok_or(NetlinkError::Malformed))
        .collect()
}

/// The interface's addresses that others can reach: all of IPv4, and IPv6 except link-local.
pub(crate) fn addresses(netlink: &mut Netlink, index: u32) -> Result<Vec<Address>, NetlinkError> {
    let payloads = netlink.dump(&Message::new(RTM_GETADDR, 0, &[0; 8]))?;
    let mut found = Vec::new();
    for payload in payloads {
        let header: &[u8; 8] = payload.first_chunk().ok_or(NetlinkError::Malformed)?;
        let v6 = i32::from(header[0]) == libc::AF_INET6;
        if u32_at(&payload, 4) != Some(index) || (v6 && header[3] == SCOPE_LINK) {
            continue;
        }
        // A point-to-point address has its own end in IFA_LOCAL and the other end in IFA_ADDRESS.
        let attribute = |wanted| {
            attributes(&payload[8..])
                .find(|(kind, _)| *kind == wanted)
                .map(|(_, value)| value)
        };
        let ip = attribute(IFA_LOCAL)
            .or_else(|| attribute(IFA_ADDRESS))
            .and_then(ip_from);
        if let Some(ip) = ip {
            found.push(Address { ip, prefix: header[1] });
        }
    }
    Ok(found)
}

/// Creates a bridge that is down: spanning tree off, no forward delay, multicast flooded (its membership would not
/// move with a guest).
pub(crate) fn create_bridge(name: &str, mtu: u32) -> Message {
    Message::new(
        RTM_NEWLINK,
        netlink::FLAG_CREATE | netlink::FLAG_EXCL,
        &link_header(0, 0, 0, 0),
    )
    .text(IFLA_IFNAME, name)
    .attr(IFLA_MTU, &mtu.to_ne_bytes())
    .nest(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, "bridge").nest(IFLA_INFO_DATA, |m| {
            m.attr(IFLA_BR_STP_STATE, &0u32.to_ne_bytes())
                .attr(IFLA_BR_FORWARD_DELAY, &0u32.to_ne_bytes())
                .attr(IFLA_BR_MCAST_SNOOPING, &[0])
        })
    })
}

/// Creates an interface that holds frames back for others.
pub(crate) fn create_ifb(name: &str) -> Message {
    let flags = netlink::FLAG_CREATE | netlink::FLAG_EXCL;
    Message::new(RTM_NEWLINK, flags, &link_header(0, 0, 0, 0))
        .text(IFLA_IFNAME, name)
        .nest(IFLA_LINKINFO, |m| m.text(IFLA_INFO_KIND, "ifb"))
}

/// What a trial makes.
#[derive(Clone, Copy)]
pub(crate) enum Trial {
    Bridge,
    Veth,
    Vxlan,
}

/// Creates an interface of this kind, to see whether the kernel can.
pub(crate) fn trial(kind: Trial) -> Message {
    let (name, word) = match kind {
        Trial::Bridge => ("godwit-try-br", "bridge"),
        Trial::Veth => ("godwit-try-v0", "veth"),
        Trial::Vxlan => ("godwit-try-vx", "vxlan"),
    };
    let flags = netlink::FLAG_CREATE | netlink::FLAG_EXCL;
    Message::new(RTM_NEWLINK, flags, &link_header(0, 0, 0, 0))
        .text(IFLA_IFNAME, name)
        .nest(IFLA_LINKINFO, |m| {
            let m = m.text(IFLA_INFO_KIND, word);
            match kind {
                Trial::Bridge => m,
                Trial::Veth => m.nest(IFLA_INFO_DATA, |m| {
                    m.nest(VETH_INFO_PEER, |m| {
                        m.raw(&link_header(0, 0, 0, 0)).text(IFLA_IFNAME, "godwit-try-v1")
                    })
                }),
                Trial::Vxlan => m.nest(IFLA_INFO_DATA, |m| m.attr(IFLA_VXLAN_ID, &1u32.to_ne_bytes())),
            }
        })
}

/// A request that changes an existing interface, without changing its flags.
pub(crate) struct Change(Message);

impl Change {
    pub(crate) fn of(index: u32) -> Self {
        Self(Message::new(RTM_SETLINK, 0, &link_header(0, index, 0, 0)))
    }

    /// Also brings it up.
    pub(crate) fn up(index: u32) -> Self {
        let up = libc::IFF_UP as u32;
        Self(Message::new(RTM_SETLINK, 0, &link_header(0, index, up, up)))
    }

    pub(crate) fn alias(self, alias: &str) -> Self {
        Self(self.0.text(IFLA_IFALIAS, alias))
    }

    pub(crate) fn mtu(self, mtu: u32) -> Self {
        Self(self.0.attr(IFLA_MTU, &mtu.to_ne_bytes()))
    }

    pub(crate) fn mac(self, mac: [u8; 6]) -> Self {
        Self(self.0.attr(IFLA_ADDRESS, &mac))
    }

    /// Rules may speak of all of a group.
    pub(crate) fn group(self, group: u32) -> Self {
        Self(self.0.attr(IFLA_GROUP, &group.to_ne_bytes()))
    }

    pub(crate) fn master(self, master: u32) -> Self {
        Self(self.0.attr(IFLA_MASTER, &master.to_ne_bytes()))
    }

    /// The kernel gives it no IPv6 address of its own, so it sends nothing unasked.
    pub(crate) fn no_ipv6_address(self) -> Self {
        Self(self.0.nest(IFLA_AF_SPEC, |m| {
            m.nest(libc::AF_INET6 as u16, |m| {
                m.attr(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE])
            })
        }))
    }

    pub(crate) fn message(self) -> Message {
        self.0
    }
}

/// Deletes an interface.
pub(crate) fn delete(index: u32) -> Message {
    Message::new(RTM_DELLINK, 0, &link_header(0, index, 0, 0))
}

/// Sets the state of a bridge port.
pub(crate) fn port_state(index: u32, state: u8) -> Message {
    Message::new(RTM_SETLINK, 0, &link_header(libc::AF_BRIDGE as u8, index, 0, 0))
        .nest(IFLA_PROTINFO, |m| m.attr(IFLA_BRPORT_STATE, &[state]))
}

/// Points the bridge's forwarding entry of `mac` at this port, as if the guest had just sent a frame: it ages, and moves
/// when the guest does.
pub(crate) fn forwarding_entry(index: u32, mac: [u8; 6]) -> Message {
    let mut header = [0; 12];
    header[0] = libc::AF_BRIDGE as u8;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_REACHABLE.to_ne_bytes());
    header[10] = NTF_MASTER;
    Message::new(RTM_NEWNEIGH, netlink::FLAG_CREATE | netlink::FLAG_REPLACE, &header).attr(NDA_LLADDR, &mac)
}

/// Adds an address, without duplicate detection (a gateway's address is the network's own).
pub(crate) fn add_address(index: u32, address: &Address) -> Message {
    change_address(RTM_NEWADDR, netlink::FLAG_CREATE | netlink::FLAG_EXCL, index, address)
}

/// Removes an address.
pub(crate) fn remove_address(index: u32, address: &Address) -> Message {
    change_address(RTM_DELADDR, 0, index, address)
}

fn change_address(kind: u16, flags: u16, index: u32, address: &Address) -> Message {
    let (family, bytes) = match address.ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let mut header = [family as u8, address.prefix, IFA_FLAG_NO_DAD, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    Message::new(kind, flags, &header)
        .attr(IFA_LOCAL, &bytes)
        .attr(IFA_ADDRESS, &bytes)
}

/// `struct ifinfomsg`.
fn link_header(family: u8, index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}
