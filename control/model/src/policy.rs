//! What a port lets through, and how much: security groups, limits, and the rules that a host makes of them.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use crate::{Mac, Name, ProjectId, Revision, SecurityGroupId, name::Reference};

/// Most rules of a security group.
pub const RULES_MAX: usize = 100;
/// Most security groups of a port.
pub const GROUPS_OF_PORT_MAX: usize = 8;
/// Most addresses beyond its own that a port may use.
pub const ALLOWED_MAX: usize = 16;
/// Least rate of a limit, bytes/s: below it not one full packet passes in a tenth of a second.
pub const RATE_MIN: u64 = 16_000;
/// Greatest rate of a limit, bytes/s: 100 Gbit/s.
pub const RATE_MAX: u64 = 12_500_000_000;
/// Greatest burst, bytes.
pub const BURST_MAX: u64 = 1 << 30;

/// Addresses with a common prefix: `10.0.0.0/8`, or one address: `10.0.0.7`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// A text that is no [`Cidr`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CidrError {
    /// It is not written as one.
    #[error("a range of addresses is written as 10.0.0.0/8 or 2001:db8::/32, one address as 10.0.0.7")]
    Form,
    /// Its prefix is longer than its address.
    #[error("a prefix has at most 32 bits for IPv4 and 128 for IPv6")]
    Prefix,
    /// It says more than its prefix.
    #[error("the address has bits beyond its prefix; clear them, or give a longer prefix")]
    Bits,
}

impl Cidr {
    /// A range; `None` where the prefix is too long or the address has bits beyond it.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let cidr = Self { address, prefix };
        (prefix <= cidr.bits() && cidr.contains_bits_only()).then_some(cidr)
    }

    /// One address.
    #[must_use]
    pub const fn one(address: IpAddr) -> Self {
        let prefix = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        Self { address, prefix }
    }

    /// Its first address.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Its prefix's length, bits.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                let shift = u32::from(self.bits() - self.prefix);
                let kept = |address: IpAddr| number(address).checked_shr(shift).unwrap_or(0);
                kept(self.address) == kept(address)
            }
            _ => false,
        }
    }

    /// Whether all of another range is in it.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }

    const fn bits(self) -> u8 {
        Self::one(self.address).prefix
    }

    fn contains_bits_only(self) -> bool {
        let beyond = u32::from(self.bits() - self.prefix);
        let mask = 1u128.checked_shl(beyond).map_or(u128::MAX, |bit| bit - 1);
        number(self.address) & mask == 0
    }
}

/// These ranges without those that others of them cover, in order.
#[must_use]
pub fn disjoint(ranges: impl IntoIterator<Item = Cidr>) -> Vec<Cidr> {
    let all: BTreeSet<Cidr> = ranges.into_iter().collect();
    let covered = |range: &Cidr| all.iter().any(|other| other != range && other.covers(*range));
    all.iter().filter(|range| !covered(range)).copied().collect()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix == self.bits() {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}/{}", self.address, self.prefix)
        }
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cidr({self})")
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let Some((address, prefix)) = text.split_once('/') else {
            return text.parse().map(Self::one).map_err(|_| CidrError::Form);
        };
        let digits = (1..=3).contains(&prefix.len()) && prefix.bytes().all(|digit| digit.is_ascii_digit());
        let prefix: u16 = prefix.parse().ok().filter(|_| digits).ok_or(CidrError::Form)?;
        let address: IpAddr = address.parse().map_err(|_| CidrError::Form)?;
        let prefix = u8::try_from(prefix).map_err(|_| CidrError::Prefix)?;
        if prefix > Self::one(address).prefix {
            return Err(CidrError::Prefix);
        }
        Self::new(address, prefix).ok_or(CidrError::Bits)
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// Their serialised form is text.
macro_rules! text_schema {
    ($($name:ty),+) => {$(
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                String::schema()
            }
        }

        impl ToSchema for $name {}
    )+};
}

text_schema!(Cidr, Ports);

/// The link-local address that a guest makes of its Ethernet address (RFC 4291, appendix A).
#[must_use]
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Which way traffic goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

/// What a rule speaks of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// All of IP.
    #[default]
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, and ICMPv6 with IPv6.
    Icmp,
}

impl Protocol {
    /// Whether it has ports.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }

    /// Whether it is this protocol of IP (RFC 790 and its successors).
    #[must_use]
    pub const fn is(self, number: u8) -> bool {
        match self {
            Self::Any => true,
            Self::Tcp => number == TCP,
            Self::Udp => number == UDP,
            Self::Icmp => number == 1 || number == 58,
        }
    }
}

/// TCP's number among the protocols of IP.
pub const TCP: u8 = 6;
/// UDP's.
pub const UDP: u8 = 17;

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// Ports of the receiving side: `22`, or `8000-8100`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

/// A text that is no [`Ports`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("ports are written as 22 or 8000-8100, from 1 to 65535, the lower first")]
pub struct PortsError;

impl Ports {
    /// The first.
    #[must_use]
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The last, which is one of them.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether a port is one of them.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for Ports {
    type Err = PortsError;

    fn from_str(text: &str) -> Result<Self, PortsError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| {
            let digits = (1..=5).contains(&text.len()) && text.bytes().all(|digit| digit.is_ascii_digit());
            text.parse::<u16>().ok().filter(|port| digits && *port > 0)
        };
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(PortsError),
        }
    }
}

impl TryFrom<String> for Ports {
    type Error = PortsError;

    fn try_from(text: String) -> Result<Self, PortsError> {
        text.parse()
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> Self {
        ports.to_string()
    }
}

/// Rules that ports of a project share: what no rule of a port's groups allows is dropped, answers to what was allowed are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecurityGroup {
    /// Its id.
    pub id: SecurityGroupId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its name, unique in the project.
    pub name: Name,
    /// What it allows; at most [`RULES_MAX`].
    pub rules: Vec<SecurityRule>,
    /// The number that the next rule gets: none is used again.
    pub next_rule: u32,
}

/// What a security group allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecurityRule {
    /// Names it in its group.
    pub number: u32,
    /// Which way the first packet goes.
    pub direction: Direction,
    /// Of which protocol.
    pub protocol: Protocol,
    /// To which ports; `None` all. Only for TCP and UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Ports>,
    /// To or from whom.
    #[serde(default)]
    pub remote: Remote,
}

/// The other side of a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Remote {
    /// Everybody.
    #[default]
    Any,
    /// Addresses of a range.
    Cidr(Cidr),
    /// The ports of a security group of the same project.
    Group(SecurityGroupId),
}

/// A rule to add to a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRule {
    /// Which way the first packet goes.
    pub direction: Direction,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// To which ports; only for TCP and UDP.
    #[serde(default)]
    pub ports: Option<Ports>,
    /// To or from addresses of a range.
    #[serde(default)]
    pub remote: Option<Cidr>,
    /// Instead: to or from the ports of a group.
    #[serde(default)]
    pub remote_group: Option<Reference>,
}

/// How much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RateLimit {
    /// Bytes/s, [`RATE_MIN`] to [`RATE_MAX`].
    pub bytes_per_s: u64,
    /// What may pass at once after a pause, bytes; `None` is what passes in 20 ms, and at least 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
}

impl RateLimit {
    /// What may pass at once, bytes. Not less than 64 KiB, which a guest hands over in one piece.
    #[must_use]
    pub fn burst(&self) -> u64 {
        let least = (self.bytes_per_s / 50).max(64 << 10);
        self.burst_bytes.unwrap_or(least).clamp(64 << 10, BURST_MAX)
    }
}

/// What people asked of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortSpec {
    /// Counts what its host was told of it: a host applies no older one.
    #[serde(default)]
    pub revision: Revision,
    /// Whether its link is held down: nothing passes.
    #[serde(default)]
    pub link_down: bool,
    /// Addresses beyond its own from which its guest may send.
    #[serde(default)]
    pub allowed: Vec<Cidr>,
    /// Its security groups; none: it is not filtered.
    #[serde(default)]
    pub groups: BTreeSet<SecurityGroupId>,
    /// How much its guest may be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_guest: Option<RateLimit>,
    /// How much its guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_guest: Option<RateLimit>,
    /// What its guest can send by its host's uplink however much others want to, bytes/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<u64>,
}

/// What a host enforces at a port: all of the guest's own Ethernet and IP addresses, and this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortPolicy {
    /// Only grows: a host keeps the newest.
    #[serde(default)]
    pub revision: Revision,
    /// Nothing passes.
    #[serde(default)]
    pub link_down: bool,
    /// Addresses beyond its own from which its guest may send.
    #[serde(default)]
    pub allowed: Vec<Cidr>,
    /// What its security groups allow; `None`: it is not filtered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// How much its guest may be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_guest: Option<RateLimit>,
    /// How much its guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_guest: Option<RateLimit>,
    /// What its guest can send by the uplink in any case, bytes/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<u64>,
}

/// What security groups allow, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// To the guest.
    pub ingress: Vec<Allowed>,
    /// From the guest.
    pub egress: Vec<Allowed>,
}

/// Packets that may begin something. What they begin goes on in both directions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Allowed {
    /// Of this protocol.
    pub protocol: Protocol,
    /// To these ports; `None` all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Ports>,
    /// To or from these; `None` everybody. None of them: nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Vec<Cidr>>,
}

/// What went through a port, from the guest's point of view. It only grows while the VM runs, moves included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Traffic {
    /// Bytes that the guest took.
    pub received_bytes: u64,
    /// Frames that it took.
    pub received_frames: u64,
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Frames that it sent.
    pub sent_frames: u64,
    /// Frames that it sent under addresses that are not its own.
    #[serde(default)]
    pub spoofed_frames: u64,
    /// Frames to it that no security group allows.
    #[serde(default)]
    pub filtered_to_guest_frames: u64,
    /// Frames from it that none allows.
    #[serde(default)]
    pub filtered_from_guest_frames: u64,
}

impl Traffic {
    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            received_bytes: self.received_bytes.saturating_add(other.received_bytes),
            received_frames: self.received_frames.saturating_add(other.received_frames),
            sent_bytes: self.sent_bytes.saturating_add(other.sent_bytes),
            sent_frames: self.sent_frames.saturating_add(other.sent_frames),
            spoofed_frames: self.spoofed_frames.saturating_add(other.spoofed_frames),
            filtered_to_guest_frames: self
                .filtered_to_guest_frames
                .saturating_add(other.filtered_to_guest_frames),
            filtered_from_guest_frames: self
                .filtered_from_guest_frames
                .saturating_add(other.filtered_from_guest_frames),
        }
    }

    /// Whether something was counted anew: a count is less than it was.
    #[must_use]
    pub const fn is_before(&self, earlier: &Self) -> bool {
        self.received_bytes < earlier.received_bytes
            || self.received_frames < earlier.received_frames
            || self.sent_bytes < earlier.sent_bytes
            || self.sent_frames < earlier.sent_frames
    }
}

/// Something that two sides do with each other: a TCP connection, or datagrams to and fro.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The other side.
    pub remote: IpAddr,
    /// Which protocol of IP.
    pub protocol: u8,
    /// The guest's port; 0 where the protocol has none.
    pub guest_port: u16,
    /// The other side's.
    pub remote_port: u16,
    /// Whether one side has said that it is over.
    #[serde(default)]
    pub ending: bool,
    /// It is forgotten after so long without a packet, s; what of that was left when it was read.
    pub expires_s: u32,
}

impl PortPolicy {
    /// Whether nothing was ever asked of the port.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

impl Filter {
    /// Whether a flow may go on: either side might begin it.
    #[must_use]
    pub fn allows(&self, flow: &Flow) -> bool {
        let fits = |rule: &Allowed, port| {
            rule.protocol.is(flow.protocol)
                && rule.ports.is_none_or(|ports| ports.contains(port))
                && rule
                    .remote
                    .as_ref()
                    .is_none_or(|remote| remote.iter().any(|range| range.contains(flow.remote)))
        };
        self.ingress.iter().any(|rule| fits(rule, flow.guest_port))
            || self.egress.iter().any(|rule| fits(rule, flow.remote_port))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_and_ports_are_read_as_they_are_shown_and_others_refused() {
        for text in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "10.0.0.7",
            "::/0",
            "2001:db8::/32",
            "fe80::1",
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        assert_eq!("10.0.0.7/32".parse::<Cidr>().unwrap().to_string(), "10.0.0.7");
        for (text, error) in [
            ("", CidrError::Form),
            ("10.0.0", CidrError::Form),
            ("10.0.0.0/", CidrError::Form),
            ("10.0.0.0/+8", CidrError::Form),
            ("10.0.0.0/8/8", CidrError::Form),
            ("10.0.0.0/33", CidrError::Prefix),
            ("10.0.0.0/999", CidrError::Prefix),
            ("::/129", CidrError::Prefix),
            ("10.0.0.1/8", CidrError::Bits),
            ("0.0.0.1/0", CidrError::Bits),
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(error), "{text}");
        }
        for text in ["1", "22", "8000-8100", "65535"] {
            assert_eq!(text.parse::<Ports>().unwrap().to_string(), text);
        }
        for text in ["", "0", "65536", "2-1", "-1", "1-", "1-2-3", "ssh", "+1"] {
            assert_eq!(text.parse::<Ports>(), Err(PortsError), "{text}");
        }
    }

    #[test]
    fn a_guests_link_local_address_is_made_of_its_ethernet_address() {
        let mac = Mac([0x02, 0x5e, 0x10, 0, 0, 1]);
        assert_eq!(link_local(mac).to_string(), "fe80::5e:10ff:fe00:1");
    }

    proptest! {
        #[test]
        fn a_range_holds_what_shares_its_prefix_and_disjoint_ranges_hold_the_same(
            ranges in prop::collection::vec((any::<u32>(), 0u8..=32), 1..8), address in any::<u32>(),
        ) {
            let of = |(address, prefix): (u32, u8)| {
                let mask = u32::MAX.checked_shl(u32::from(32 - prefix)).unwrap_or(0);
                Cidr::new(Ipv4Addr::from(address & mask).into(), prefix).unwrap()
            };
            // Some of them near each other, so that they do cover each other.
            let ranges: Vec<Cidr> = ranges.into_iter().map(|(a, p)| of((a & 0xff00_00ff, p))).collect();
            let address = IpAddr::from(Ipv4Addr::from(address & 0xff00_00ff));
            let held = |ranges: &[Cidr]| ranges.iter().any(|range| range.contains(address));
            let fewer = disjoint(ranges.iter().copied());
            prop_assert_eq!(held(&ranges), held(&fewer));
            for range in &fewer {
                prop_assert!(!fewer.iter().any(|other| other != range && other.covers(*range)));
            }
        }
    }
}
