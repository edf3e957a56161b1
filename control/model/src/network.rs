//! Networks, their address ranges, and the ports by which VMs attach to them.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use crate::{
    Generation, HostId, Name, NetworkId, PortId, PortSpec, ProjectId, Revision, SubnetId, Timestamp, VmId,
    addressing::Addressing,
};

/// A layer-2 segment that spans the hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its name, unique in the project.
    pub name: Name,
    /// How hosts carry it.
    pub mode: NetworkMode,
    /// Largest packet, bytes.
    pub mtu: u16,
    /// What its guests are told beside their IPv4 addresses, and how.
    #[serde(default)]
    pub addressing: Addressing,
}

/// How hosts carry a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// Each agent's bridge, joined by its uplink: VMs appear as hosts of that segment.
    Bridged,
}

/// An address range of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subnet {
    /// Its id.
    pub id: SubnetId,
    /// Its network.
    pub network: NetworkId,
    /// Its address part: `10.91.0.0`.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Its prefix length: 24.
    pub prefix: u8,
    /// The way out, if there is one.
    #[schema(value_type = Option<String>)]
    pub gateway: Option<Ipv4Addr>,
    /// First address given to ports.
    #[schema(value_type = String)]
    pub first: Ipv4Addr,
    /// Last address given to ports.
    #[schema(value_type = String)]
    pub last: Ipv4Addr,
}

/// A VM's attachment to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// Its id.
    pub id: PortId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its network.
    pub network: NetworkId,
    /// Where its address comes from.
    pub subnet: SubnetId,
    /// Its hardware address: derived from its id, checked to be unique.
    pub mac: Mac,
    /// Its address.
    #[schema(value_type = String)]
    pub ip: Ipv4Addr,
    /// Its IPv6 address, where its network has a prefix: see [`crate::addressing::V6Prefix::address_of`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub v6: Option<Ipv6Addr>,
    /// Its VM; `None` while a released address rests.
    pub vm: Option<VmId>,
    /// The host on which its frames are let through.
    pub bound: Option<HostId>,
    /// Its VM's generation when it was bound.
    pub generation: Generation,
    /// Until when its address rests after release: others may still have it in their tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rests_until: Option<Timestamp>,
    /// What people asked of it.
    #[serde(default)]
    pub spec: Box<PortSpec>,
    /// The revision of that which its host has said is in force.
    #[serde(default)]
    pub applied: Revision,
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^([0-9a-f]{2}:){5}[0-9a-f]{2}$")]
pub struct Mac(pub [u8; 6]);

/// A text that is no [`Mac`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an Ethernet address is six pairs of hexadecimal digits with colons: 02:00:5e:10:00:01")]
pub struct MacError;

impl Mac {
    /// The address of a port: locally administered, unicast, 40 bits from the random tail of the port's UUIDv7.
    #[must_use]
    pub fn of_port(port: PortId) -> Self {
        let id = port.0.as_bytes();
        Self([0x02, id[11], id[12], id[13], id[14], id[15]])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or(MacError)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError)?;
        }
        if parts.next().is_some() {
            Err(MacError)
        } else {
            Ok(Self(bytes))
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}
