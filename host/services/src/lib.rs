//! What a host answers its guests at their own taps: DHCP, router advertisements, and what they ask about themselves.
//!
//! ```text
//!                        ┌ dhcp      67/UDP              ─▶ the port's address, always the same
//!   a guest's frame ──▶ Desk ┤ advert    router solicitation ─▶ prefix, MTU, name servers
//!     from its tap       ├ arp, nd   who has 169.254.169.254? ─▶ this desk
//!                        └ metadata  80/TCP ─▶ TCP (smoltcp) ─▶ HTTP ─▶ what the guest was told
//! ```
//!
//! Invariants:
//! - A desk serves one port, and answers out of that port's allocation alone. It knows who asks by the tap that a frame came in on; a
//!   frame with another MAC or IP address than the port's gets no answer.
//! - Nothing here is kept but unfinished TCP connections: another host, or the same one after a restart of its agent, answers alike.
//! - Pure: frames, times and randomness come in, frames go out. Whatever the bytes, nothing panics, and everything is bounded.
//! - All hosts answer from the same addresses: a guest that has moved asks on where it asked before.

mod advert;
mod bucket;
mod desk;
mod dhcp;
mod frame;
mod http;
mod metadata;
mod neighbour;
mod tcp;
mod token;

use std::net::{Ipv4Addr, Ipv6Addr};

use model::{
    Definition, HostId, Mac, Name, PortId, VmId,
    addressing::{AddressingMethod, MetadataAccess},
    order::PortUse,
};

pub use desk::Desk;
pub use metadata::Told;
pub use token::{KEY_BYTES, Key};

/// Where guests ask for their metadata, and whom they renew their leases with.
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where guests with IPv6 ask for their metadata.
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The MAC of all desks, of the locally administered ones; no port has one that begins so.
pub const SERVICE_MAC: Mac = Mac([0x06, 0x67, 0x6f, 0x64, 0x77, 0x74]);

/// Whom a desk serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its VM.
    pub vm: VmId,
    /// The VM's name.
    pub name: Name,
    /// The host that runs it.
    pub host: HostId,
    /// Its vCPUs.
    pub vcpus: u16,
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// All its ports, in their order.
    pub ports: Vec<PortUse>,
    port: usize,
}

impl Guest {
    /// A VM, at one of its ports; `None` when it has no such one.
    #[must_use]
    pub fn at(definition: &Definition, host: HostId, port: PortId) -> Option<Self> {
        Some(Self {
            vm: definition.vm,
            name: definition.name.clone(),
            host,
            vcpus: definition.layout.vcpus,
            memory_mib: definition.layout.memory_mib,
            port: definition.ports.iter().position(|of| of.port == port)?,
            ports: definition.ports.clone(),
        })
    }

    /// The port, with its addresses and what is told beside them.
    #[must_use]
    pub fn port(&self) -> &PortUse {
        &self.ports[self.port]
    }

    /// Whether there is anything that the guest may ask at this port.
    #[must_use]
    pub fn is_served(&self) -> bool {
        let told = &self.port().addressing;
        told.method == AddressingMethod::Dhcp || told.v6.is_some() || told.metadata != MetadataAccess::Off
    }
}
