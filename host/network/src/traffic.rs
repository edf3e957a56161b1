//! What went through all ports and uplinks, in one look.

use std::collections::BTreeMap;

use model::PortId;

use crate::{
    InterfaceName, Network, PortCounters,
    link::{self, Link},
    netlink::NetlinkError,
    port::found_port,
};

/// The driver kind of one half of a virtual cable, which hosts in namespaces have for hardware.
const CABLE: &str = "veth";

/// The counters of this host's links.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Ports of VMs.
    pub ports: BTreeMap<PortId, PortCounters>,
    /// Links to other machines, by name.
    pub uplinks: BTreeMap<String, UplinkCounters>,
}

/// What went through a link to other machines since it was made, from the host's point of view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UplinkCounters {
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Frames received and dropped.
    pub received_dropped: u64,
    /// Frames dropped instead of being sent.
    pub sent_dropped: u64,
}

impl Network {
    /// The counters of all ports, and of all links to other machines: the hardware, and those of `uplinks` that are virtual cables. A
    /// bond and a VLAN are seen by the hardware below them, so that nothing counts twice.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn traffic(&self, uplinks: &[InterfaceName]) -> Result<Traffic, NetlinkError> {
        let mut traffic = Traffic::default();
        for link in link::all(&mut self.slow())? {
            if let Some(found) = found_port(&link) {
                traffic.ports.insert(found.port.id, PortCounters::of(link.statistics));
            } else if is_uplink(&link, uplinks) {
                let counted = link.statistics;
                let counters = UplinkCounters {
                    received_bytes: counted.rx_bytes,
                    sent_bytes: counted.tx_bytes,
                    received_dropped: counted.rx_dropped,
                    sent_dropped: counted.tx_dropped,
                };
                traffic.uplinks.insert(link.name, counters);
            }
        }
        Ok(traffic)
    }
}

fn is_uplink(link: &Link, named: &[InterfaceName]) -> bool {
    let named = named.iter().any(|name| name.as_str() == link.name);
    !link.is_loopback() && (link.kind.is_empty() || (named && link.kind == CABLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_are_hardware_and_named_cables_and_nothing_counts_twice() {
        let link = |name: &str, kind: &str, flags| Link {
            name: name.to_owned(),
            kind: kind.to_owned(),
            flags,
            ..Link::default()
        };
        let named = ["vm0", "bond0"].map(|name| name.parse().unwrap());
        for (wanted, one) in [
            (true, link("eth0", "", 0)),
            (false, link("lo", "", libc::IFF_LOOPBACK as u32)),
            (true, link("vm0", "veth", 0)),
            (false, link("veth9", "veth", 0)),
            (false, link("bond0", "bond", 0)),
            (false, link("br0", "bridge", 0)),
        ] {
            assert_eq!(is_uplink(&one, &named), wanted, "{one:?}");
        }
    }
}
