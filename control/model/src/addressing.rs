//! How the guests of a network learn what they need: their addresses, names, and whom to ask for more.

use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use crate::{Mac, seed::is_hostname};

/// Most name servers of a network.
pub const NAME_SERVERS_MAX: usize = 4;
/// Length of every IPv6 prefix: guests make their own addresses of shorter ones only (RFC 4862, section 5.5.3).
pub const V6_PREFIX_LENGTH: u8 = 64;
/// Shortest and longest lease, seconds.
pub const LEASE_S: std::ops::RangeInclusive<u32> = 120..=604_800;
/// A lease where nothing else is asked for, seconds.
const LEASE_DEFAULT_S: u32 = 3600;

/// What guests of a network are told beside their IPv4 addresses, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Addressing {
    /// How guests learn their addresses.
    pub method: AddressingMethod,
    /// The IPv6 prefix; `None` where guests have no IPv6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v6: Option<V6Prefix>,
    /// Name servers, at most 4.
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<IpAddr>,
    /// The domain in which guests look for short names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// How long a guest may keep its address before it asks again, seconds.
    pub lease_s: u32,
    /// Whether guests may ask their host about themselves.
    pub metadata: MetadataAccess,
}

impl Default for Addressing {
    fn default() -> Self {
        Self {
            method: AddressingMethod::default(),
            v6: None,
            dns: vec![],
            search: None,
            lease_s: LEASE_DEFAULT_S,
            metadata: MetadataAccess::default(),
        }
    }
}

/// How guests learn their addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AddressingMethod {
    /// Their seed has them. Hosts answer no DHCP, so another server of a bridged segment is not disturbed.
    #[default]
    Static,
    /// They ask by DHCP, and their host answers.
    Dhcp,
}

/// Whether guests may ask their host about themselves, at 169.254.169.254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MetadataAccess {
    /// With a session token only (IMDSv2): a program in the guest that can be made to fetch an address gives nothing away.
    #[default]
    Token,
    /// Also without a token, as IMDSv1 and NoCloud over HTTP do.
    Open,
    /// They may not.
    Off,
}

/// An IPv6 prefix of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct V6Prefix {
    /// Its upper half; the lower is zero: `fd00:91::`.
    #[schema(value_type = String)]
    pub address: Ipv6Addr,
    /// The link-local address of the router: only by this can a router advertisement name it. `None` where there is no way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub gateway: Option<Ipv6Addr>,
}

impl V6Prefix {
    /// A port's address in it: what a guest makes of the prefix and its MAC by itself (RFC 4291, appendix A). As a MAC is of one port
    /// alone and never given again, so is this.
    #[must_use]
    pub fn address_of(&self, mac: Mac) -> Ipv6Addr {
        eui64(self.address, mac)
    }
}

/// A port's link-local address, as its guest makes it of its MAC (RFC 4291, appendix A).
#[must_use]
pub fn link_local(mac: Mac) -> Ipv6Addr {
    eui64(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), mac)
}

fn eui64(prefix: Ipv6Addr, mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let mut bytes = prefix.octets();
    bytes[8..].copy_from_slice(&[a ^ 0x02, b, c, 0xff, 0xfe, d, e, f]);
    bytes.into()
}

/// Why addressing is not possible, as the end of a sentence about the network.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressingError {
    /// Not a prefix for guests.
    #[error(
        "the IPv6 prefix {0}/64 cannot be given to guests; use 64 bits of a global or unique local prefix, the rest zero: fd00:91::/64"
    )]
    Prefix(Ipv6Addr),
    /// A router that cannot be advertised.
    #[error(
        "the IPv6 gateway {0} is no link-local address; routers advertise themselves by theirs: give fe80::1, say, and give that address to the router"
    )]
    Gateway(Ipv6Addr),
    /// Too many name servers.
    #[error("{0} name servers are too many; give at most 4")]
    NameServers(usize),
    /// Not a server's address.
    #[error("{0} is no address of a name server; give a unicast address that guests can reach")]
    NameServer(IpAddr),
    /// Not a domain.
    #[error("the search domain is none; use letters, digits, hyphens and dots, at most 63 between dots and 253 in all")]
    Search,
    /// Too short or too long.
    #[error("a lease of {0} s is not possible; give 2 minutes to 7 days")]
    Lease(u32),
}

impl Addressing {
    /// Whether guests can be told this.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn check(&self) -> Result<(), AddressingError> {
        if let Some(V6Prefix { address, gateway }) = self.v6 {
            let [a, ..] = address.octets();
            let host_bits = address.segments()[4..] != [0; 4];
            // 2000::/3 is global, fc00::/7 unique local (RFC 4291, RFC 4193).
            if host_bits || (a & 0xe0 != 0x20 && a & 0xfe != 0xfc) {
                return Err(AddressingError::Prefix(address));
            }
            if let Some(gateway) = gateway.filter(|gateway| !gateway.is_unicast_link_local()) {
                return Err(AddressingError::Gateway(gateway));
            }
        }
        if self.dns.len() > NAME_SERVERS_MAX {
            return Err(AddressingError::NameServers(self.dns.len()));
        }
        let useless = |ip: &IpAddr| {
            ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_loopback()
                || matches!(ip, IpAddr::V4(ip) if ip.is_broadcast() || ip.octets()[0] == 0)
        };
        if let Some(server) = self.dns.iter().copied().find(useless) {
            return Err(AddressingError::NameServer(server));
        }
        if self.search.as_deref().is_some_and(|search| !is_hostname(search)) {
            return Err(AddressingError::Search);
        }
        if !LEASE_S.contains(&self.lease_s) {
            return Err(AddressingError::Lease(self.lease_s));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_addresses_are_what_its_guest_makes_of_its_mac() {
        // RFC 4291, appendix A, with the example's bits.
        let mac = Mac([0x02, 0x5e, 0x10, 0x00, 0x00, 0x01]);
        let prefix = V6Prefix {
            address: "fd00:91::".parse().unwrap(),
            gateway: None,
        };
        assert_eq!(prefix.address_of(mac).to_string(), "fd00:91::5e:10ff:fe00:1");
        assert_eq!(link_local(mac).to_string(), "fe80::5e:10ff:fe00:1");
    }

    #[test]
    fn what_guests_cannot_be_told_is_refused_with_what_would_be_right() {
        let told = |json: &str| {
            let told: Addressing = serde_json::from_str(json).unwrap();
            told.check().map_err(|error| error.to_string())
        };
        for good in [
            "{}",
            r#"{"method":"dhcp","v6":{"address":"fd00:91::","gateway":"fe80::1"},"dns":["9.9.9.9","2620:fe::fe"],"search":"a.example"}"#,
        ] {
            assert_eq!(told(good), Ok(()));
        }
        for (bad, right) in [
            (r#"{"v6":{"address":"fd00:91::1"}}"#, "fd00:91::/64"),
            (r#"{"v6":{"address":"fe80::"}}"#, "fd00:91::/64"),
            (r#"{"v6":{"address":"ff02::"}}"#, "fd00:91::/64"),
            (r#"{"v6":{"address":"fd00::","gateway":"fd00::1"}}"#, "fe80::1"),
            (r#"{"dns":["0.0.0.0"]}"#, "unicast"),
            (r#"{"dns":["ff02::1"]}"#, "unicast"),
            (
                r#"{"dns":["9.9.9.1","9.9.9.2","9.9.9.3","9.9.9.4","9.9.9.5"]}"#,
                "at most 4",
            ),
            (r#"{"search":"a\noption"}"#, "letters"),
            (r#"{"lease_s":1}"#, "2 minutes"),
        ] {
            assert!(told(bad).unwrap_err().contains(right), "{bad}");
        }
    }
}
